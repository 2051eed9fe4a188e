// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

/// @notice Status of a provider. Value 0 means that it never registered.
enum ProviderStatus {
    /// @dev Never registered.
    NONE,
    /// @dev Registered, but no version of its hardware was approved yet.
    WAITING_APPROVAL,
    /// @dev Receives jobs while its approval lasts.
    ACTIVE,
    /// @dev In maintenance: it ends its jobs and gets no new ones.
    DRAINING,
    /// @dev Banned by the approver.
    BANNED
}

/// @notice Hardware of a cluster.
/// @param nodes Number of nodes.
/// @param cpusPerNode CPUs per node.
/// @param memPerNode Memory per node, in MB.
/// @param gpusPerNode GPUs per node.
struct Hardware {
    uint24 nodes;
    uint16 cpusPerNode;
    uint32 memPerNode;
    uint16 gpusPerNode;
}

/// @notice The part of its hardware that a provider offers to the grid now.
/// @param cpus Total CPUs.
/// @param mem Total memory, in MB.
/// @param gpus Total GPUs.
struct Offer {
    uint32 cpus;
    uint48 mem;
    uint32 gpus;
}

/// @notice Prices in credit-wei per second.
/// @param cpu Per CPU.
/// @param gpu Per GPU.
/// @param mem Per MB of memory.
struct Prices {
    uint64 cpu;
    uint64 gpu;
    uint64 mem;
}

/// @notice An unpacked provider record.
/// @param id Zero until its first approval.
struct Provider {
    uint16 id;
    address account;
    ProviderStatus status;
    uint40 approvedUntil;
    uint32 version;
    uint32 pendingVersion;
    Hardware hardware;
    Hardware pendingHardware;
    Offer offer;
    Prices prices;
    string[] labels;
}
