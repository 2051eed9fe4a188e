// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import {Capacity, Tariff} from "../libraries/Capacity.sol";
import {Hardware, Offer, Prices, Provider, ProviderStatus} from "../types/ProviderTypes.sol";

/// @title Providers that may run jobs
/// @notice Hardware, offers, prices, labels, approval, maintenance and bans of providers.
/// Memory is in MB, prices are in credit-wei per second, times in seconds.
interface IProviderRegistry {
    // ------------------------------------------------------------------ events

    /// @notice A provider was approved for the first time and got its id.
    event ProviderRegistered(uint16 indexed id, address indexed provider);
    /// @notice Hardware was proposed for approval.
    event HardwareProposed(address indexed provider, uint32 indexed version, Hardware hardware);
    /// @notice A version of the hardware was approved until the given time.
    event ProviderApproved(
        address indexed provider, uint32 indexed version, Hardware hardware, uint40 approvedUntil
    );
    /// @notice The part of the hardware that the provider offers to the grid changed.
    event OfferChanged(address indexed provider, Offer offer);
    /// @notice Prices changed. Jobs that are already assigned keep their rate.
    event PricesChanged(address indexed provider, Prices prices);
    /// @notice Labels changed; each is `key=value`.
    event LabelsChanged(address indexed provider, string[] labels);
    /// @notice The provider started or ended its maintenance.
    event DrainingChanged(address indexed provider, bool draining);
    /// @notice The approver banned or unbanned the provider.
    event BanChanged(address indexed provider, bool banned, string reason);

    // ------------------------------------------------------------------ errors

    /// @notice The account never registered.
    error NotRegistered(address account);
    /// @notice The provider is banned.
    error ProviderBanned(address provider);
    /// @notice No version of the provider was approved yet.
    error NotApproved(address provider);
    /// @notice The hardware has no nodes, CPUs or memory, or exceeds the fields of an offer.
    error InvalidHardware();
    /// @notice The offer exceeds the approved hardware.
    error OfferTooLarge(uint32 cpus, uint48 memoryMb, uint32 gpus);
    /// @notice The price exceeds the cap.
    error PriceTooHigh(uint256 price, uint256 cap);
    /// @notice There are more labels than allowed.
    error TooManyLabels(uint256 count, uint256 max);
    /// @notice The label is too long, or not `key=value`.
    error InvalidLabel(uint256 index);
    /// @notice The reason is too long.
    error ReasonTooLong(uint256 length, uint256 max);
    /// @notice The version to approve is neither the latest proposal nor the approved version.
    error VersionMismatch(address provider, uint32 version, uint32 pending);
    /// @notice A constructor argument is out of bounds.
    error OutOfBounds(bytes32 parameter, uint256 value, uint256 min, uint256 max);
    /// @notice All provider ids are in use.
    error RegistryFull();

    // --------------------------------------------------------------- providers

    /// @notice Registers the caller, or proposes new hardware for approval.
    /// @dev The approved version stays valid. A provider gets its id at the first approval, so that accounts
    /// without an approval can't use up the ids. Requirements: not banned; each node has CPUs and memory; prices
    /// and labels within bounds.
    /// Warning: prices and labels take effect at once, hardware only after its approval.
    /// @param hardware The whole cluster.
    /// @param prices In credit-wei per second.
    /// @param labels Each of the form `key=value`.
    /// @return version Version of the proposed hardware.
    function register(Hardware calldata hardware, Prices calldata prices, string[] calldata labels)
        external
        returns (uint32 version);

    /// @notice Offers all or a part of the approved hardware to the grid; zero is allowed.
    /// @dev Requirements: approved at least once; not more than the approved hardware.
    function setOffer(Offer calldata offer) external;

    /// @notice Changes the caller's prices for later assignments.
    function setPrices(Prices calldata prices) external;

    /// @notice Replaces the caller's labels.
    function setLabels(string[] calldata labels) external;

    /// @notice Starts or ends the caller's maintenance.
    function setDraining(bool draining) external;

    // ---------------------------------------------------------------- approver

    /// @notice Approves exactly this version for `approvalPeriod` seconds from now.
    /// @dev The approved version can be approved again to extend its approval. An offer of all hardware becomes
    /// an offer of all new hardware; a smaller offer is kept, but limited to the new hardware.
    /// Requirements: approver; provider registered and not banned; `version` is pending or approved.
    function approve(address provider, uint32 version) external;

    /// @notice Bans a provider: it gets no jobs until `unban`.
    /// @param reason Human-readable; at most 256 bytes.
    function ban(address provider, string calldata reason) external;

    /// @notice Ends the ban of a provider, whose approval is unchanged.
    function unban(address provider) external;

    // ------------------------------------------------------------------- views

    /// @notice Id of a provider, zero until its first approval.
    function idOf(address provider) external view returns (uint16);

    /// @notice Address of a provider, zero for an unknown id.
    function accountOf(uint16 id) external view returns (address);

    /// @notice Status of a provider. It does not depend on `approvedUntil`, the end of the approval.
    function statusOf(address provider) external view returns (ProviderStatus);

    /// @notice The data of a provider on which assignments depend, packed as stored; see also `getProvider`.
    function capacityOf(address provider) external view returns (Capacity capacity, Tariff tariff);

    /// @notice The whole record of a provider; its status is NONE if it never registered.
    function getProvider(address provider) external view returns (Provider memory);

    /// @notice Number of providers ever approved; ids run from one to this number.
    function providerCount() external view returns (uint16);

    /// @notice Validity of an approval, in seconds.
    function approvalPeriod() external view returns (uint256);
}
