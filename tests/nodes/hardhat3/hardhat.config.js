// A block for each transaction and one each second; the accounts are the development accounts of the devnet.
const mnemonic = "test test test test test test test test test test test junk";

export default {
  networks: {
    node: {
      type: "edr-simulated",
      chainId: 1337,
      hardfork: "cancun",
      accounts: { mnemonic, count: 11, accountsBalance: "1000000000000000000000000" },
      mining: { auto: true, interval: 1000 },
    },
  },
};
