// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import {Capacity, Tariff} from "../libraries/Capacity.sol";
import {Hardware, Offer, Prices, Provider, ProviderStatus} from "../types/ProviderTypes.sol";

/// @title Who may run jobs
/// @notice Hardware, offers, prices, labels, approval, maintenance and bans of providers.
/// Memory is in MB, prices are in credit-wei a second, times in seconds.
interface IProviderRegistry {
    // ------------------------------------------------------------------ events

    /// @notice A provider was approved for the first time and got its id.
    event ProviderRegistered(uint16 indexed id, address indexed provider);
    /// @notice Hardware was put forward for approval.
    event HardwareProposed(address indexed provider, uint32 indexed version, Hardware hardware);
    /// @notice A version of the hardware came into force, until the given time.
    event ProviderApproved(
        address indexed provider, uint32 indexed version, Hardware hardware, uint40 approvedUntil
    );
    /// @notice The share of the hardware that the provider gives to the grid changed.
    event OfferChanged(address indexed provider, Offer offer);
    /// @notice Prices changed. Jobs that are already assigned keep theirs.
    event PricesChanged(address indexed provider, Prices prices);
    /// @notice Labels changed; each is `key=value`.
    event LabelsChanged(address indexed provider, string[] labels);
    /// @notice The provider went into maintenance, or came back.
    event DrainingChanged(address indexed provider, bool draining);
    /// @notice The approver shut the provider out, or let it in again.
    event BanChanged(address indexed provider, bool banned, string reason);

    // ------------------------------------------------------------------ errors

    /// @notice The account never registered.
    error NotRegistered(address account);
    /// @notice The provider is shut out.
    error ProviderBanned(address provider);
    /// @notice No version of the provider was approved yet.
    error NotApproved(address provider);
    /// @notice Hardware without nodes, cpus or memory, or of more than the fields of an offer hold.
    error InvalidHardware();
    /// @notice An offer of more than the hardware in force.
    error OfferTooLarge(uint32 cpus, uint48 memoryMb, uint32 gpus);
    /// @notice A price above the cap.
    error PriceTooHigh(uint256 price, uint256 cap);
    /// @notice More labels than allowed.
    error TooManyLabels(uint256 count, uint256 max);
    /// @notice A label that is too long, or not `key=value`.
    error InvalidLabel(uint256 index);
    /// @notice A reason that is too long.
    error ReasonTooLong(uint256 length, uint256 max);
    /// @notice The version to approve is neither the one proposed last nor the one in force.
    error VersionMismatch(address provider, uint32 version, uint32 pending);
    /// @notice A constructor argument out of bounds.
    error OutOfBounds(bytes32 parameter, uint256 value, uint256 min, uint256 max);
    /// @notice No further ids are left.
    error RegistryFull();

    // --------------------------------------------------------------- providers

    /// @notice Registers the caller, or puts new hardware forward for approval.
    /// @dev The version in force stays in force. An id is given at the first approval, so that strangers can't
    /// use up the ids. Requirements: not banned; each node has cpus and memory; prices and labels within bounds.
    /// Warning: prices and labels take effect at once, hardware waits for the approver.
    /// @param hardware The whole cluster.
    /// @param prices Credit-wei a second.
    /// @param labels `key=value` each.
    /// @return version The version that awaits approval.
    function register(Hardware calldata hardware, Prices calldata prices, string[] calldata labels)
        external
        returns (uint32 version);

    /// @notice Gives all or a part of the approved hardware to the grid; zero is allowed.
    /// @dev Requirements: approved once; not more than the hardware in force.
    function setOffer(Offer calldata offer) external;

    /// @notice Changes the caller's prices for jobs assigned from now on.
    function setPrices(Prices calldata prices) external;

    /// @notice Replaces the caller's labels.
    function setLabels(string[] calldata labels) external;

    /// @notice Starts or ends the caller's own maintenance.
    function setDraining(bool draining) external;

    // ---------------------------------------------------------------- approver

    /// @notice Puts exactly this version in force for `approvalPeriod` seconds from now.
    /// @dev The version in force can be approved again to prolong it. An offer of all the hardware follows the
    /// hardware; a smaller one is kept, cut to what the new hardware has.
    /// Requirements: approver; provider registered and not banned; `version` pending or in force.
    function approve(address provider, uint32 version) external;

    /// @notice Shuts a provider out: it gets no job until `unban`.
    /// @param reason For people; at most 256 bytes.
    function ban(address provider, string calldata reason) external;

    /// @notice Lets a provider in again, with its approval as it was.
    function unban(address provider) external;

    // ------------------------------------------------------------------- views

    /// @notice Id of a provider, zero until its first approval.
    function idOf(address provider) external view returns (uint16);

    /// @notice Address of a provider, zero for an unknown id.
    function accountOf(uint16 id) external view returns (address);

    /// @notice Standing of a provider; the end of an approval stands in `approvedUntil`.
    function statusOf(address provider) external view returns (ProviderStatus);

    /// @notice What decides about assignments to a provider, packed as it is stored; `getProvider` is for people.
    function capacityOf(address provider) external view returns (Capacity capacity, Tariff tariff);

    /// @notice Everything about one provider; status NONE for one that never registered.
    function getProvider(address provider) external view returns (Provider memory);

    /// @notice Number of providers ever approved; ids run from one to this.
    function providerCount() external view returns (uint16);

    /// @notice Seconds that an approval lasts.
    function approvalPeriod() external view returns (uint256);
}
