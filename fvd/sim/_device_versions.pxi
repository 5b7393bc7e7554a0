# SPDX-License-Identifier: Apache-2.0
# The contents that a block of the simulated device may still have: what was written to it since it was last on the medium, newest first,
# down to what the medium holds. A crash chooses one of them.
#
# Offers: give_versions, lose_block, put_block, settle_block
# Needs: _device: its structs


cdef int put_block(SimulatedDevice device, uint64_t block, const uint8_t *content, uint64_t number) except -1:
    cdef uint64_t size = device.logical_block_bytes
    cdef Version *version
    cdef Version *before = device.newest[block]
    cdef int missing = 1 if before != NULL else 2
    cdef const uint8_t *held = device.image + block * size
    cdef bytes medium = None
    if device.landing:
        device.landing.pop(block, None)       # what comes later to the same place is not overtaken by what had failed before
    if device.lost and before == NULL:
        medium = device.lost.pop(block, None)
        if medium is not None:
            held = medium
    while missing:
        version = device.spare
        if version == NULL:
            version = <Version *>malloc(sizeof(Version) + size)
            if version == NULL:
                raise MemoryError("simulated device")
        else:
            device.spare = version.older
        version.older = before
        version.number = number if missing == 1 else 0
        memcpy(<uint8_t *>(version + 1), content if missing == 1 else held, size)
        before = version
        missing -= 1
    device.newest[block] = before
    memcpy(device.image + block * size, content, size)
    if not device.listed[block]:
        if device.touched_count == device.touched_capacity:
            device.touched = <uint64_t *>realloc(device.touched, device.touched_capacity * 16)
            if device.touched == NULL:
                raise MemoryError("simulated device")
            device.touched_capacity *= 2
        device.touched[device.touched_count] = block
        device.touched_count += 1
        device.listed[block] = 1
    return 0


cdef void settle_block(SimulatedDevice device, uint64_t block, uint64_t only, uint64_t before) noexcept:
    """The newest content that is on the medium now: that of operation `only`, or of one that completed before the moment `before`."""
    cdef Version *version = device.newest[block]
    cdef uint64_t at
    while version != NULL and version.older != NULL:
        if only:
            if version.number == only:
                break
        else:
            at = device.completed_at[version.number]
            if at and at < before:
                break
        version = version.older
    if version == NULL:
        return
    if version == device.newest[block]:
        device.newest[block] = NULL
        give_versions(device, version)
    else:
        give_versions(device, version.older)
        version.older = NULL


cdef void give_versions(SimulatedDevice device, Version *version) noexcept:
    cdef Version *older
    while version != NULL:
        older = version.older
        version.older = device.spare
        device.spare = version
        version = older


cdef int lose_block(SimulatedDevice device, uint64_t block) except -1:
    cdef Version *version = device.newest[block]
    if version == NULL:
        return 0
    while version.older != NULL:
        version = version.older
    device.lost[block] = (<char *>(version + 1))[: device.logical_block_bytes]
    give_versions(device, device.newest[block])
    device.newest[block] = NULL
    device.losses += 1
    return 0
