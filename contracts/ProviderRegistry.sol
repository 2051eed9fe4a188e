// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import {
    AccessControlDefaultAdminRules
} from "@openzeppelin/contracts/access/extensions/AccessControlDefaultAdminRules.sol";

import {IProviderRegistry} from "./interfaces/IProviderRegistry.sol";
import {Capacity, Tariff} from "./libraries/Capacity.sol";
import {Hardware, Offer, Prices, Provider, ProviderStatus} from "./types/ProviderTypes.sol";

/// @title Registry of providers
/// @notice See `IProviderRegistry`.
contract ProviderRegistry is IProviderRegistry, AccessControlDefaultAdminRules {
    /// @notice Role that may approve, ban and unban.
    bytes32 public constant APPROVER_ROLE = keccak256("APPROVER_ROLE");

    /// @notice Highest price per CPU, GPU or MB, in credit-wei per second.
    uint256 public constant MAX_PRICE = 10 ether;
    /// @notice Maximum number of labels per provider.
    uint256 public constant MAX_LABELS = 32;
    /// @notice Maximum length of a label, in bytes.
    uint256 public constant MAX_LABEL_LENGTH = 128;
    /// @notice Maximum length of the reason of a ban, in bytes.
    uint256 public constant MAX_REASON_LENGTH = 256;
    /// @notice Bounds of `approvalPeriod`, in seconds.
    uint256 public constant MIN_APPROVAL_PERIOD = 1 hours;
    /// @notice Bounds of `approvalPeriod`, in seconds.
    uint256 public constant MAX_APPROVAL_PERIOD = 730 days;

    /// @inheritdoc IProviderRegistry
    uint256 public immutable approvalPeriod;

    // An assignment reads only the first two slots, as `Capacity` and `Tariff`.
    struct Record {
        // slot 1: approved hardware, offer, status
        uint24 nodes;
        uint16 cpusPerNode;
        uint32 memPerNode;
        uint16 gpusPerNode;
        uint32 offeredCpus;
        uint48 offeredMemory;
        uint32 offeredGpus;
        uint40 approvedUntil;
        bool draining;
        bool banned;
        // slot 2: prices and versions
        uint64 cpuPrice;
        uint64 gpuPrice;
        uint64 memPrice;
        uint32 version;
        uint32 pendingVersion;
        // other fields
        Hardware pending;
        uint16 id;
        string[] labels;
    }

    /// @inheritdoc IProviderRegistry
    uint16 public providerCount;
    /// @inheritdoc IProviderRegistry
    mapping(uint16 id => address) public accountOf;
    mapping(address provider => Record) private _records;

    /// @param admin First administrator; a transfer takes two steps.
    /// @param adminDelay Delay of a transfer of the administrator, in seconds.
    /// @param approvalPeriod_ Validity of an approval, in seconds.
    constructor(address admin, uint48 adminDelay, uint256 approvalPeriod_)
        AccessControlDefaultAdminRules(adminDelay, admin)
    {
        if (approvalPeriod_ < MIN_APPROVAL_PERIOD || approvalPeriod_ > MAX_APPROVAL_PERIOD) {
            revert OutOfBounds(
                "approvalPeriod", approvalPeriod_, MIN_APPROVAL_PERIOD, MAX_APPROVAL_PERIOD
            );
        }
        approvalPeriod = approvalPeriod_;
    }

    // --------------------------------------------------------------- providers

    /// @inheritdoc IProviderRegistry
    function register(Hardware calldata hardware, Prices calldata prices, string[] calldata labels)
        external
        returns (uint32 version)
    {
        _checkHardware(hardware);
        Record storage record = _records[msg.sender];
        if (record.banned) revert ProviderBanned(msg.sender);
        version = ++record.pendingVersion;
        record.pending = hardware;
        emit HardwareProposed(msg.sender, version, hardware);
        _setPrices(record, prices);
        _setLabels(record, labels);
    }

    /// @inheritdoc IProviderRegistry
    function setOffer(Offer calldata offer) external {
        Record storage record = _own();
        if (record.version == 0) revert NotApproved(msg.sender);
        Offer memory all = _all(_hardware(record));
        if (offer.cpus > all.cpus || offer.mem > all.mem || offer.gpus > all.gpus) {
            revert OfferTooLarge(offer.cpus, offer.mem, offer.gpus);
        }
        _setOffer(record, msg.sender, offer);
    }

    /// @inheritdoc IProviderRegistry
    function setPrices(Prices calldata prices) external {
        _setPrices(_own(), prices);
    }

    /// @inheritdoc IProviderRegistry
    function setLabels(string[] calldata labels) external {
        _setLabels(_own(), labels);
    }

    /// @inheritdoc IProviderRegistry
    function setDraining(bool draining) external {
        _own().draining = draining;
        emit DrainingChanged(msg.sender, draining);
    }

    // ---------------------------------------------------------------- approver

    /// @inheritdoc IProviderRegistry
    function approve(address provider, uint32 version) external onlyRole(APPROVER_ROLE) {
        Record storage record = _recordOf(provider);
        if (record.banned) revert ProviderBanned(provider);
        uint32 pending = record.pendingVersion;
        if (version == 0 || (version != pending && version != record.version)) {
            revert VersionMismatch(provider, version, pending);
        }
        if (record.id == 0) _giveId(record, provider);
        // The sum fits 40 bits for thirty thousand years, because the period is at most 730 days.
        uint40 until = uint40(block.timestamp + approvalPeriod);
        record.approvedUntil = until;
        // Versions and offers are set only by this contract, so a comparison for equality is safe.
        // slither-disable-next-line incorrect-equality
        Hardware memory hardware = version == record.version ? _hardware(record) : record.pending;
        if (version != record.version) _putInForce(record, provider, hardware, version);
        emit ProviderApproved(provider, version, hardware, until);
    }

    /// @inheritdoc IProviderRegistry
    function ban(address provider, string calldata reason) external onlyRole(APPROVER_ROLE) {
        _setBanned(provider, true, reason);
    }

    /// @inheritdoc IProviderRegistry
    function unban(address provider) external onlyRole(APPROVER_ROLE) {
        _setBanned(provider, false, "");
    }

    // ------------------------------------------------------------------- views

    /// @inheritdoc IProviderRegistry
    function idOf(address provider) external view returns (uint16) {
        return _records[provider].id;
    }

    /// @inheritdoc IProviderRegistry
    function statusOf(address provider) external view returns (ProviderStatus) {
        return _status(_records[provider]);
    }

    /// @inheritdoc IProviderRegistry
    function capacityOf(address provider) external view returns (Capacity capacity, Tariff tariff) {
        return _words(_records[provider]);
    }

    /// @inheritdoc IProviderRegistry
    function getProvider(address provider) external view returns (Provider memory) {
        Record storage record = _records[provider];
        return Provider({
            id: record.id,
            account: provider,
            status: _status(record),
            approvedUntil: record.approvedUntil,
            version: record.version,
            pendingVersion: record.pendingVersion,
            hardware: _hardware(record),
            pendingHardware: record.pending,
            offer: _offer(record),
            prices: _prices(record),
            labels: record.labels
        });
    }

    // ---------------------------------------------------------------- internal

    /// @dev Every registration increments `pendingVersion`, so zero means that the account never registered.
    function _recordOf(address provider) private view returns (Record storage record) {
        record = _records[provider];
        if (record.pendingVersion == 0) revert NotRegistered(provider);
    }

    function _own() private view returns (Record storage) {
        return _recordOf(msg.sender);
    }

    function _status(Record storage record) private view returns (ProviderStatus) {
        (Capacity capacity, Tariff tariff) = _words(record);
        return capacity.statusOf(tariff);
    }

    /// @dev Reads the first two slots of a record; their layout is that of `Capacity` and `Tariff`.
    function _words(Record storage record) private view returns (Capacity capacity, Tariff tariff) {
        assembly ("memory-safe") {
            capacity := sload(record.slot)
            tariff := sload(add(record.slot, 1))
        }
    }

    function _hardware(Record storage record) private view returns (Hardware memory) {
        return Hardware(record.nodes, record.cpusPerNode, record.memPerNode, record.gpusPerNode);
    }

    function _offer(Record storage record) private view returns (Offer memory) {
        return Offer(record.offeredCpus, record.offeredMemory, record.offeredGpus);
    }

    function _prices(Record storage record) private view returns (Prices memory) {
        return Prices(record.cpuPrice, record.gpuPrice, record.memPrice);
    }

    /// @dev No cast loses bits: `_checkHardware` rejects hardware whose totals exceed these types.
    function _all(Hardware memory hardware) private pure returns (Offer memory) {
        return Offer(
            uint32(uint256(hardware.nodes) * hardware.cpusPerNode),
            uint48(uint256(hardware.nodes) * hardware.memPerNode),
            uint32(uint256(hardware.nodes) * hardware.gpusPerNode)
        );
    }

    function _checkHardware(Hardware calldata hardware) private pure {
        uint256 nodes = hardware.nodes;
        if (
            nodes == 0 || hardware.cpusPerNode == 0 || hardware.memPerNode == 0
                || nodes * hardware.cpusPerNode > type(uint32).max
                || nodes * hardware.memPerNode > type(uint48).max
                || nodes * hardware.gpusPerNode > type(uint32).max
        ) revert InvalidHardware();
    }

    function _giveId(Record storage record, address provider) private {
        if (providerCount == type(uint16).max) revert RegistryFull();
        uint16 id = ++providerCount;
        record.id = id;
        accountOf[id] = provider;
        emit ProviderRegistered(id, provider);
    }

    function _putInForce(
        Record storage record,
        address provider,
        Hardware memory hardware,
        uint32 version
    ) private {
        Offer memory before = _all(_hardware(record));
        Offer memory offer = _offer(record);
        Offer memory all = _all(hardware);
        // slither-disable-start incorrect-equality
        if (offer.cpus == before.cpus || offer.cpus > all.cpus) offer.cpus = all.cpus;
        if (offer.mem == before.mem || offer.mem > all.mem) offer.mem = all.mem;
        if (offer.gpus == before.gpus || offer.gpus > all.gpus) offer.gpus = all.gpus;
        // slither-disable-end incorrect-equality
        record.version = version;
        record.nodes = hardware.nodes;
        record.cpusPerNode = hardware.cpusPerNode;
        record.memPerNode = hardware.memPerNode;
        record.gpusPerNode = hardware.gpusPerNode;
        _setOffer(record, provider, offer);
    }

    function _setOffer(Record storage record, address provider, Offer memory offer) private {
        record.offeredCpus = offer.cpus;
        record.offeredMemory = offer.mem;
        record.offeredGpus = offer.gpus;
        emit OfferChanged(provider, offer);
    }

    function _setPrices(Record storage record, Prices calldata prices) private {
        _checkPrice(prices.cpu);
        _checkPrice(prices.gpu);
        _checkPrice(prices.mem);
        record.cpuPrice = prices.cpu;
        record.gpuPrice = prices.gpu;
        record.memPrice = prices.mem;
        emit PricesChanged(msg.sender, prices);
    }

    function _checkPrice(uint64 price) private pure {
        if (price > MAX_PRICE) revert PriceTooHigh(price, MAX_PRICE);
    }

    function _setLabels(Record storage record, string[] calldata labels) private {
        if (labels.length > MAX_LABELS) revert TooManyLabels(labels.length, MAX_LABELS);
        delete record.labels;
        for (uint256 i = 0; i < labels.length; ++i) {
            if (!_isLabel(bytes(labels[i]))) revert InvalidLabel(i);
            record.labels.push(labels[i]);
        }
        emit LabelsChanged(msg.sender, labels);
    }

    /// @dev Requires the form `key=value`: an equals sign that is neither first nor last.
    function _isLabel(bytes calldata label) private pure returns (bool) {
        if (label.length > MAX_LABEL_LENGTH) return false;
        for (uint256 i = 0; i < label.length; ++i) {
            if (label[i] == "=") return i > 0 && i + 1 < label.length;
        }
        return false;
    }

    function _setBanned(address provider, bool banned, string memory reason) private {
        if (bytes(reason).length > MAX_REASON_LENGTH) {
            revert ReasonTooLong(bytes(reason).length, MAX_REASON_LENGTH);
        }
        _recordOf(provider).banned = banned;
        emit BanChanged(provider, banned, reason);
    }
}
