// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

/// @notice Standing of a provider. Value 0 means that it never registered.
enum ProviderStatus {
    /// @dev Never registered.
    NONE,
    /// @dev Registered; no version of its hardware was approved yet.
    WAITING_APPROVAL,
    /// @dev Receives jobs while its approval lasts.
    ACTIVE,
    /// @dev Own maintenance: ends what it has, gets nothing new.
    DRAINING,
    /// @dev Shut out by the approver.
    BANNED
}

/// @notice What a cluster consists of.
/// @param nodes Number of nodes.
/// @param cpusPerNode Cpus of each node.
/// @param memPerNode Memory of each node, in MB.
/// @param gpusPerNode Gpus of each node.
struct Hardware {
    uint24 nodes;
    uint16 cpusPerNode;
    uint32 memPerNode;
    uint16 gpusPerNode;
}

/// @notice What of its hardware a provider gives to the grid now.
/// @param cpus Cpus in all.
/// @param mem Memory in all, in MB.
/// @param gpus Gpus in all.
struct Offer {
    uint32 cpus;
    uint48 mem;
    uint32 gpus;
}

/// @notice Prices in credit-wei a second.
/// @param cpu For one cpu.
/// @param gpu For one gpu.
/// @param mem For one MB of memory.
struct Prices {
    uint64 cpu;
    uint64 gpu;
    uint64 mem;
}

/// @notice Everything about one provider, for readers.
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
