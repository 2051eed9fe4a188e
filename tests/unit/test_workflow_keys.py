"""Every key of DeepSquare's workflow format: accepted with its meaning, or refused with line and reason."""

from __future__ import annotations

import json
import os
import re
import textwrap
from pathlib import Path

import jsonschema
import pytest
import yaml

from deepsquare_chain.errors import JobFileError
from deepsquare_chain.workflow import Definition, JobFile, load_job_file, parse_job_file
from deepsquare_chain.workflow.abilities import ABILITIES, needed_abilities
from deepsquare_chain.workflow.jobfile import convert, dump, read_job_tree, unwrap
from deepsquare_chain.workflow.schema import job_file_schema

#: Job files that DeepSquare published; they are not ours to copy.
PUBLISHED = Path(
    os.environ.get("DEEPSQUARE_JOBFILES") or Path(__file__).parents[3] / "shared" / "jobfiles"
)

EVERY_KEY = """\
# A comment
job:
  enableLogging: true
  dependsOn: ['afterok:12:15-20', prepare]
  resources: {tasks: 4, cpusPerTask: 2, memPerCpu: 100, gpus: 4}
  env:
    - {key: A, value: 'a,b'}
    - {key: N, value: 1}
  input:
    s3: &bucket
      region: eu
      bucketUrl: s3://data
      path: /in
      accessKeyId: AK-1
      secretAccessKey: SK-1
      endpointUrl: https://s3.example
  inputMode: 493
  output:
    s3: {<<: *bucket, path: /out, deleteSync: true}
  continuousOutputSync: true
  virtualNetworks:
    - {name: net, gatewayAddress: 10.0.0.1/24}
  steps:
    - name: server
      launch:
        handleName: Server
        signalOnParentStepExit: 15
        steps:
          - run:
              command: serve
              network: slirp4netns
              mapUid: 0
              mapGid: 0
              dns: [9.9.9.9, '2620:fe::fe']
              customNetworkInterfaces:
                - vnet: {name: net, address: 10.0.0.2/24}
                - bore: {boreAddress: 'bore.example:2200', targetPort: 80, secret: SK-2}
                - wireguard:
                    address: [10.1.0.1/24]
                    privateKey: SK-3
                    peers:
                      - publicKey: pub
                        preSharedKey: SK-4
                        allowedIPs: [0.0.0.0/0]
                        endpoint: peer.example:51820
                        persistentKeepalive: 25
    - name: old bore
      run:
        command: x
        network: pasta
        customNetworkInterfaces:
          - bore: {address: bore.example, port: 2200, targetPort: 80}
    - name: image
      dependsOn: [SERVER]
      if: '"$A" == "a,b"'
      run:
        command: python app.py
        shell: ENTRYPOINT
        workDir: /app
        env: {X: 'true'}
        resources: {tasks: 2, cpusPerTask: 2, memPerCpu: 50, gpusPerTask: 2}
        mpi: pmix_v4
        disableCpuBinding: true
        container:
          image: user/app:1.0@sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef
          registry: registry.example:5000
          username: someone
          password: SK-5
          mounts:
            - {hostDir: /opt/data, containerDir: /data, options: ro}
          mountHome: true
          readOnlyRootFS: true
          x11: true
      catch:
        - run: {command: 'echo "$DEEPSQUARE_ERROR_CODE"'}
      finally:
        - run: {command: echo finally}
    - name: apptainer
      run:
        command: ''
        container: {image: library/app, registry: registry.example, apptainer: true, deepsquareHosted: true}
    - name: loops
      for:
        parallel: false
        range: {begin: 3, end: 1, increment: -1}
        steps:
          - for:
              parallel: true
              items: [x, 2]
              steps:
                - run: {command: 'echo "$index $item"', shell: /bin/ash}
    - steps:
        - name: module
          use:
            source: github.com/owner/repository/folder@v1
            args: [{key: IN, value: x}]
            exportEnvAs: OUT
            steps:
              - run: {command: echo inside}
"""


def parse(text: str, *, lenient: bool = False) -> JobFile:
    return parse_job_file(text.encode(), "job.yaml", lenient=lenient)


def refused(text: str) -> str:
    with pytest.raises(JobFileError) as error_info:
        parse(text)
    return str(error_info.value)


def with_run(keys: str, **more: str) -> str:
    head = "resources: {tasks: 2, cpusPerTask: 1, memPerCpu: 10, gpus: 1}\n"
    return f"{head}{more.get('top', '')}\nsteps:\n- run: {{command: x, {keys}}}\n"


NETWORK = "virtualNetworks: [{name: a, gatewayAddress: 10.7.0.1/24}]"
VNET = "network: pasta, customNetworkInterfaces: [{{vnet: {{name: a, address: {}}}}}]"


def with_step(keys: str) -> str:
    return f"resources: {{memPerCpu: 10}}\nsteps:\n- {{{keys}}}\n"


def test_every_key_is_understood() -> None:
    parsed = parse(EVERY_KEY)
    assert parsed.warnings == ()
    assert set(needed_abilities(parsed.definition)) == set(ABILITIES) - {
        "charliecloud", "container", "enroot", "mpi.pmi2", "netns", "netns.interfaces"
    }  # fmt: skip
    assert parsed.definition.env == {"A": "a,b", "N": "1"}
    assert parsed.depends_on == ("afterok:12:15-20", "prepare")
    assert parsed.definition.output is not None
    assert parsed.definition.output.s3 is not None
    assert parsed.definition.output.s3.path == "/out"
    assert parsed.definition.output.s3.region == "eu"
    assert Definition.from_bytes(parsed.definition.to_bytes()) == parsed.definition


def test_conditions_for_the_scheduler() -> None:
    conditions = (
        "startAfter: 2030-01-31T08:00Z\nstartBefore: '2030-01-31T10:00+01:00'\npatience: 10m\n"
        "preferences: [region=ch, 'compute.gflops>=10']\nplacement: spread"
    )
    parsed = parse(with_run("env: {A: 1}", top=conditions)).conditions(1_800_000_000)
    assert parsed.to_uses() == (
        "deepsquare.begin=1896076800,deepsquare.deadline=1896080400,deepsquare.patience=600,"
        "deepsquare.prefer=region=ch,deepsquare.prefer=compute.gflops>=10,"
        "deepsquare.placement=spread"
    )
    relative = parse(with_run("env: {A: 1}", top="startAfter: 1h\nstartBefore: 7200"))
    assert relative.conditions(1_000).to_uses() == "deepsquare.begin=4600,deepsquare.deadline=8200"
    with pytest.raises(JobFileError, match="are relative to the submission"):
        relative.conditions(1_000, repeatable=True)


@pytest.mark.parametrize(
    ("conditions", "reason"),
    [
        ("startAfter: 2030-01-31T08:00", "startAfter must be a date and time with a zone"),
        ("startBefore: 2030-31-01T08:00Z", "startBefore must be a date and time with a zone"),
        ("startBefore: soon", "startBefore must be seconds or a text"),
        ("patience: 0", "patience must be"),
        ("placement: apart", "placement must be"),
        ("preferences: [ch]", "preferences[0] is not understood"),
        ("preferences: [deepsquare.begin=1]", "keys that begin with deepsquare."),
        ("preferences: [a=1, b=1, c=1, d=1, e=1]", "preferences"),
    ],
)
def test_invalid_conditions_are_refused(conditions: str, reason: str) -> None:
    assert reason in refused(with_run("env: {A: 1}", top=conditions))


@pytest.mark.parametrize(
    "conditions", ["startBefore: 2020-01-01T00:00Z", "startAfter: 2h\nstartBefore: 1h"]
)
def test_a_job_that_can_never_start_is_not_submitted(conditions: str) -> None:
    with pytest.raises(JobFileError, match="leaves no time to start"):
        parse(with_run("env: {A: 1}", top=conditions)).conditions(1_800_000_000)


def test_a_file_means_the_same_as_yaml_and_as_json() -> None:
    tree = yaml.safe_load(EVERY_KEY)
    for text in (
        json.dumps(tree),
        json.dumps(tree, indent="\t"),
        json.dumps(tree["job"], indent=1).replace("s3://", "s3:\\/\\/"),
        yaml.safe_dump(tree["job"], default_flow_style=True),
    ):
        assert parse(text).definition == parse(EVERY_KEY).definition


def test_secrets_are_hidden_from_readers() -> None:
    redacted = json.dumps(parse(EVERY_KEY).definition.redacted())
    assert "SK-" not in redacted
    assert "AK-" not in redacted
    with_env = parse(with_run("env: {DB_PASSWORD: SK-1, PATH_A: /x, URL: 'http://u:SK-2@h/?SK-3'}"))
    redacted = json.dumps(with_env.definition.redacted())
    assert "SK-" not in redacted
    assert "/x" in redacted


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (with_step("network: host, run: {command: x}"), "job.yaml:3: steps[0].network is an unknown key here; it belongs under steps[0].run"),
        (with_step("gpusPerTask: 1, run: {command: x}"), "it belongs under steps[0].run.resources"),
        (with_step("parallel: true, run: {command: x}"), "it belongs under steps[0].for"),
        (with_step("targetPort: 1, run: {command: x}"), "under steps[0].run.customNetworkInterfaces.bore"),
        (with_step("objective: COST, run: {command: x}"), "it belongs under the top level"),
        (with_run("catch: []"), "steps[0].run.catch is an unknown key here; it belongs under steps[0]"),
        (with_run("name: x"), "steps[0].run.name is an unknown key here; it belongs under steps[0]"),
        (with_run("env: {}", top="output: {http: {url: 'http://h', region: r}}"), "output.http.region is an unknown key here; it belongs under output.s3"),
        (with_run("resources: {gpus: 1}"), "run.resources.gpus is an unknown key here; it belongs under resources"),
        (with_step("runn: {command: x}"), "steps[0].runn is an unknown key; did you mean run?"),
        ("resources: {memPerCpu: 1, gpus: 2, gpusPerTask: 1}\nsteps: [{run: {command: x}}]", "resources.gpusPerTask is a key from before November 2023; remove it"),
        (with_step("use: {source: ./m, commit: abc}"), "steps[0].use.commit is written when"),
        ("resources: {memPerCpu: 1, gpusPerTask: 1}\nsteps: [{run: {command: x}}]", "resources.gpusPerTask is a key from before November 2023, and resources.gpus is missing"),
        (with_step("run: {command: x}, steps: [{run: {command: y}}]"), "has run and steps"),
        ("job: {steps: []}\nname: x\n", "job.yaml:2: name is next to the key job; with that key"),
        (with_step("name: only"), "job.yaml:3: steps[0] has nothing to run"),
        (with_step("dependsOn: [later], run: {command: x}"), "refers to a step that is not launched before this one: 'later'"),
        (with_step("launch: {handleName: 'a b', steps: [{run: {command: x}}]}"), "must be a name of letters"),
        (with_step("launch: {steps: []}"), "launch.steps must have at least one entry"),
        (with_step("for: {parallel: 'true', items: [a], steps: [{run: {command: x}}]}"), "parallel must be true or false, not 'true'"),
        (with_step("for: {items: [a], steps: [{run: {command: x}}]}"), "for.parallel is missing"),
        (with_step("for: {parallel: true, steps: [{run: {command: x}}]}"), "must have one of range, items"),
        (with_step("for: {parallel: true, range: {begin: 1, end: 2000}, steps: [{run: {command: x}}]}"), "has 2,000 parallel iterations"),
        (with_step("for: {parallel: true, range: {begin: 1, end: 99999999999}, steps: [{run: {command: x}}]}"), "range.end must be a whole number"),
        (with_step("for: {parallel: true, range: {begin: 1}, steps: [{run: {command: x}}]}"), "range.end is missing"),
        (with_step("if: ' ', run: {command: x}"), "if must be a test of bash"),
        (with_step("if: false, run: {command: x}"), "steps[0].if is always true in bash, where a text that is not empty is true: 'false'"),
        (with_step("if: '[[ -f x ]]', run: {command: x}"), "if must be the inside of bash's [[ ]], such as -f file"),
        (with_step("if: '[ 1 -eq 2 ]', run: {command: x}"), "if must be the inside of bash's [[ ]]"),
        (with_step("if: 'test -f x', run: {command: x}"), "if must be the inside of bash's [[ ]]"),
        (with_step("if: '${{ github.ref }}', run: {command: x}"), "bash, which has no ${{ }}"),
        (with_step("if: '$A == \"b', run: {command: x}"), "if has an unclosed quote"),
        (with_step("use: {source: nowhere}"), "source must be HOST/OWNER/REPOSITORY"),
        (with_step("use: {source: 'github.com/a/b;id'}"), "source must be HOST/OWNER/REPOSITORY"),
        (with_run("shell: /bin/zsh"), "shell must be /bin/bash, /bin/ash, /bin/sh or ENTRYPOINT"),
        (with_run("shell: ENTRYPOINT"), "ENTRYPOINT needs a container"),
        (with_run("workDir: here"), "workDir must be an absolute path"),
        (with_run("workDir: /a/../b"), "workDir must not contain .."),
        (with_run("network: bridge"), "network must be host, slirp4netns or pasta"),
        (with_run("dns: [9.9.9.9]"), "dns needs network"),
        (with_run("network: pasta, dns: [dns.example]"), "dns[0] must be an IP address"),
        (with_run("mpi: pmix"), "mpi must be none, pmix_v4 or pmi2"),
        (with_run("mapUid: -1"), "mapUid must be a whole number from 0"),
        (with_run("mapUid: 5, container: {image: a, apptainer: true}"), "mapUid can only be 0 with Apptainer"),
        (with_run("customNetworkInterfaces: [{bore: {boreAddress: 'a:1', targetPort: 1}}]"), "need network"),
        (with_run("network: pasta, customNetworkInterfaces: [{}]"), "must be one of wireguard, bore, vnet"),
        (with_run("network: pasta, customNetworkInterfaces: [{bore: {targetPort: 1}}]"), "needs boreAddress"),
        (with_run("network: pasta, customNetworkInterfaces: [{bore: {boreAddress: 'a:70000', targetPort: 1}}]"), "boreAddress must be host:port"),
        (with_run("network: pasta, customNetworkInterfaces: [{vnet: {name: a, address: 10.0.0.1/8}}]"), "is not one of virtualNetworks (none)"),
        (with_run(VNET.format("10.8.0.2/24"), top=NETWORK), "vnet.address is not in the network 10.7.0.0/24"),
        (with_run(VNET.format("10.7.0.1/24"), top=NETWORK), "is the address of the network's gateway, 10.7.0.1"),
        (with_run("network: pasta, container: {image: a, runtime: podman}, customNetworkInterfaces: [{bore: {boreAddress: 'a:1', targetPort: 1}}]"), "can't be used with Podman"),
        (with_run("container: {image: A}"), "image must be an image such as"),
        (with_run("container: {image: 'docker://alpine:3'}"), "image must be an image without a protocol"),
        (with_run("container: {image: images/app.sif}"), "image must be an absolute path below STORAGE_PATH if it is a file"),
        (with_run("container: {image: a, mounts: [{hostDir: '/a:b', containerDir: /c, options: ro}]}"), "hostDir must not contain spaces, : or ,"),
        (with_run("container: {image: a, registry: 'https://x'}"), "registry must be the host name"),
        (with_run("container: {image: a, username: u}"), "needs username, password and registry together"),
        (with_run("container: {image: a, apptainer: 'true,'}"), "apptainer must be true or false, not 'true,'"),
        (with_run("container: {image: a, apptainer: true, runtime: podman}"), "contradicts apptainer"),
        (with_run("container: {image: a, mounts: [{hostDir: /a, containerDir: /b}]}"), "mounts[0].options is missing"),
        (with_run("resources: {tasks: 3}"), "ask for 3 CPUs; the job has 2"),
        (with_run("resources: {gpusPerTask: 2}"), "ask for 2 GPUs; the job has 1"),
        (with_run("resources: {memPerCpu: 100}"), "ask for 100 MB of memory; the job has 20"),
        (with_run("env: [{key: A, value: x}, {key: A, value: y}]"), "env[1] sets 'A' a second time"),
        (with_run("env: [{key: A}]"), "env[0].value is missing"),
        (with_run("env: [{key: A, value: x, more: y}]"), "env[0].more is an unknown key; a variable has key, value"),
        (with_run("env: [{key: PATH, value: x}]"), "env.PATH can't be set here"),
        (with_run("env: {A: 1}", top="env: {NTASKS: 1}"), "env.NTASKS can't be set for the whole job"),
        (with_run("env: {A: 1}", top="inputMode: 512"), "inputMode must be a whole number from 0 to 511"),
        (with_run("env: {A: 1}", top="input: {}"), "input must have one of http, s3"),
        (with_run("env: {A: 1}", top="output: {http: {url: 'ftp://x'}}"), "must be an http or https address"),
        (with_run("env: {A: 1}", top="virtualNetworks: [{name: a, gatewayAddress: x}]"), "gatewayAddress must be an address"),
        (with_run("env: {A: 1}", top="virtualNetworks:\n- {name: a, gatewayAddress: 10.0.0.1/24}\n- {name: a, gatewayAddress: 10.0.1.1/24}"), "job.yaml:4: virtualNetworks[1].name 'a' occurs twice"),
        (with_run("env: {A: 1}", top="dependsOn: [after:1 2]"), "dependsOn[0] must be afterok:JOB"),
        (with_run("env: {A: 1}", top="uses: [a=b]\nrequirements: [c=d]"), "another name of requirements"),
    ],
)  # fmt: skip
def test_refusals_name_the_key_and_the_remedy(text: str, message: str) -> None:
    assert message in refused(text)


def test_the_line_of_a_refusal_is_that_of_the_key() -> None:
    text = EVERY_KEY.replace("        shell: ENTRYPOINT\n", "        shel: ENTRYPOINT\n")
    line = text.split("shel:")[0].count("\n") + 1
    assert f"job.yaml:{line}: steps[2].run.shel is an unknown key; did you mean shell?" in refused(
        text
    )


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("{key: A, value: [x]}", "env.A must be text, not a list"),
        ("{key: PATH, value: x}", "env.PATH can't be set here"),
        ("{key: B, value: x}", "env[1] sets 'B' a second time"),
        ("{name: A, value: x}", "env[1].name is an unknown key"),
        ("A=x", "env[1] must be a mapping"),
    ],
)
def test_the_line_of_a_variable_is_that_of_its_entry(entry: str, message: str) -> None:
    text = f"resources: {{memPerCpu: 10}}\nenv:\n- {{key: B, value: x}}\n- {entry}\nsteps: [{{run: {{command: x}}}}]\n"
    assert f"job.yaml:4: {message}" in refused(text)


@pytest.mark.parametrize(
    "test",
    ["test == $A", "-f test", "! -e x", "$A == false", "true", "$A =~ ^[0-9]+$", "(1 -eq 1)"],
)
def test_conditions_of_bash_are_accepted(test: str) -> None:
    assert parse(with_step(f"if: '{test}', run: {{command: x}}")).definition.steps[0].if_ == test


@pytest.mark.parametrize(
    ("loop", "message"),
    [
        ("range: {begin: 5, end: 1}", "job.yaml:3: steps[0].for has no iterations, so its steps never run; write increment: -1"),
        ("items: []", "job.yaml:3: steps[0].for has no iterations, so its steps never run"),
    ],
)  # fmt: skip
def test_a_loop_without_iterations_is_reported(loop: str, message: str) -> None:
    text = with_step(f"for: {{parallel: false, {loop}, steps: [{{run: {{command: x}}}}]}}")
    assert parse(text).warnings == (message,)


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("resources: {cpus: 4, memPerCpu: 1}\nsteps: [{run: {command: x}}]", "cpusPerTask"),
        ("resources: {memory: 4}\nsteps: [{run: {command: x}}]", "memPerCpu"),
        (with_step("needs: [a], run: {command: x}"), "dependsOn"),
        (with_run("script: y"), "command"),
        (with_run("container: {image: a, volumes: ['/a:/b']}"), "mounts"),
        (with_run("env: {}", top="walltime: 1h"), "timeLimit"),
    ],
)
def test_keys_of_other_formats_are_recognised(text: str, key: str) -> None:
    assert f"is an unknown key; did you mean {key}?" in refused(text)


@pytest.mark.parametrize("text", ["true", "True", "TRUE"])
def test_booleans_of_the_core_schema(text: str) -> None:
    assert parse(with_run(f"disableCpuBinding: {text}")).definition.steps[0].run == (
        parse(with_run("disableCpuBinding: true")).definition.steps[0].run
    )
    assert "must be true or false" in refused(with_run(f"disableCpuBinding: '{text}'"))


@pytest.mark.parametrize(("written", "mode"), [("493", 493), ("0755", 493), ("0o644", 420)])
def test_modes_are_decimal_or_marked_as_octal(written: str, mode: int) -> None:
    parsed = parse(with_run("env: {}", top=f"inputMode: {written}"))
    assert parsed.definition.input_mode == mode
    assert "inputMode has no effect without input" in parsed.warnings[0]


def test_a_variable_that_the_grid_replaces_is_reported() -> None:
    parsed = parse(with_run("env: {}", top="env:\n- {key: USER, value: me}"))
    assert parsed.warnings == (
        "job.yaml:3: env.USER has no effect: the grid sets it; a step may, under run.env",
    )


def test_keys_without_a_value_are_not_given() -> None:
    text = with_run("env: , container: , resources: ") + "output:\n"
    assert parse(text).definition == parse(with_run("shell: ")).definition


def test_anchors_repeat_and_later_ones_replace() -> None:
    text = (
        "resources: {memPerCpu: 10}\nsteps:\n- run: &r {command: a, env: &e {A: x}}\n"
        "- run: {<<: *r, command: &e b}\n- run: {<<: [{command: *e}, *r]}\n"
    )
    runs = [step.run for step in parse(text).definition.steps]
    assert [(run.command, run.env) for run in runs if run] == [
        ("a", {"A": "x"}), ("b", {"A": "x"}), ("b", {"A": "x"})
    ]  # fmt: skip


def test_lenient_parsing_skips_unknown_keys_and_reports_them() -> None:
    text = with_step("network: host, run: {command: x, zz: {a: b}}") + "extra: 1\n"
    parsed = parse(text, lenient=True)
    assert parsed.definition == parse(with_step("run: {command: x}")).definition
    assert [warning.split(" is ")[0] for warning in parsed.warnings] == [
        "job.yaml:3: steps[0].run.zz", "job.yaml:3: steps[0].network", "job.yaml:4: extra"
    ]  # fmt: skip
    first = parse(f"extra: 1\n{text.replace('extra: 1', '')}", lenient=True)
    assert first.warnings[0].startswith("job.yaml:1: extra is an unknown key")
    with pytest.raises(JobFileError, match="must be true or false"):
        parse(with_run("disableCpuBinding: 5, zz: 1"), lenient=True)


def converted(text: str) -> tuple[JobFile, list[str]]:
    tree, _ = unwrap(*read_job_tree(text.encode(), "job.yaml"))
    changes = convert(tree)
    return parse(dump(tree, text)), changes


def test_older_keys_are_converted() -> None:
    old = (
        "# kept\nresources: {ntasks: 2, memPerCpu: 10, gpusPerTask: 2}\n"
        "env: {A: True, B: '0755', C: \"x\\ny\"}\n"
        "steps:\n- name: flat\n  command: nvidia-smi\n  container: {image: a}\n"
        "- run: {command: x, mapRoot: true, network: pasta, customNetworkInterfaces: "
        "[{bore: {address: b, port: 1, targetPort: 2}}]}\n"
        "- network: pasta\n  resources:\n  run: {command: y, resources: {tasks: 2}}\n"
        "- run: {command: z, x11: true, image: b, apptainer: true}\n"
    )
    new = (
        "resources: {tasks: 2, memPerCpu: 10, gpus: 4}\n"
        "env: {A: 'True', B: '0755', C: \"x\\ny\"}\n"
        "steps:\n- name: flat\n  run: {command: nvidia-smi, container: {image: a}}\n"
        "- run: {command: x, mapUid: 0, mapGid: 0, network: pasta, customNetworkInterfaces: "
        "[{bore: {boreAddress: 'b:1', targetPort: 2}}]}\n"
        "- run: {command: y, network: pasta, resources: {tasks: 2}}\n"
        "- run: {command: z, container: {x11: true, image: b, apptainer: true}}\n"
    )
    parsed, changes = converted(old)
    assert parsed.definition == parse(new).definition
    assert len(changes) == 11
    assert (
        converted(EVERY_KEY.replace("address: bore.example, port: 2200", "boreAddress: 'b:1'"))[1]
        == []
    )


def test_gpus_per_task_that_agree_with_gpus_are_removed() -> None:
    head, tail = "resources: {tasks: 2, memPerCpu: 1, gpus: 4", "}\nsteps: [{run: {command: x}}]"
    parsed, changes = converted(f"{head}, gpusPerTask: 2{tail}")
    assert parsed.definition == parse(head + tail).definition
    assert changes == ["resources.gpusPerTask is removed; resources.gpus says the same"]


def test_the_reference_has_every_key_and_valid_examples() -> None:
    reference = (Path(__file__).parents[2] / "docs" / "jobs.md").read_text()
    schema = job_file_schema()
    sections = [schema, *schema["$defs"].values()]
    keys = {key for section in sections for key in section.get("properties", {})}
    words = set(re.findall(r"\w+", reference))
    assert keys - words == set()
    examples = re.findall(r"```yaml\n(.*?)```", reference, re.DOTALL)
    assert len(examples) == 2
    for example in examples:
        assert parse(example).warnings == ()


def test_the_schema_for_editors_has_every_key() -> None:
    parsed = job_file_schema()
    assert set(parsed["required"]) == {"resources", "steps"}
    assert set(parsed["properties"]) >= {"credits", "virtualNetworks", "inputMode", "requirements"}
    assert "readOnlyRootFS" in parsed["$defs"]["ContainerSection"]["properties"]
    assert "commit" not in parsed["$defs"]["UseSection"]["properties"]
    validator = jsonschema.Draft202012Validator(parsed)
    numbers = with_run("env: {A: 1.5, B: true}", top="credits: 1.5\ntimeLimit: 60")
    for text in (EVERY_KEY, f"job:\n{textwrap.indent(numbers, '  ')}"):
        assert list(validator.iter_errors(yaml.safe_load(text)["job"])) == []
    assert list(validator.iter_errors(yaml.safe_load(with_step("network: host"))))


def verdicts() -> list[tuple[str, bool]]:
    """Return the name of each published file, and whether the table lists it as accepted."""
    parsed = []
    for line in (PUBLISHED / "README.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.split("|")]
        for at, accepted in ((1, True), (2, False)):
            name = cells[at].split(" ")[0].rstrip(":") if len(cells) > at else ""
            if name.endswith((".yaml", ".json")):
                parsed.append((name, accepted))
    return parsed


@pytest.mark.skipif(not PUBLISHED.is_dir(), reason="the published job files are not here")
def test_published_files_get_their_verdicts() -> None:
    expected = verdicts()
    assert len(expected) == 22
    for name, is_accepted in expected:
        if is_accepted:
            load_job_file(PUBLISHED / name)
        else:
            with pytest.raises(JobFileError, match=rf"{name}:\d+: "):
                load_job_file(PUBLISHED / name)
