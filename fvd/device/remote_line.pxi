# SPDX-License-Identifier: Apache-2.0
# A connection as _remote.pyx keeps it: its operations and the NBD reads that they are made of, from free lists, so that a steady state
# allocates nothing; and the calls that libnbd makes back. No Python here.
#
# Offers: align_up, free_line, new_operation, new_piece, note_extents, piece_counted, piece_ended, release_piece, say_why, unlist
# Needs: _remote: its structs

cdef int piece_ended(void *user, int *error) noexcept nogil:
    """libnbd is done with a read. It holds the handle's lock here."""
    cdef Piece *piece = <Piece *>user
    cdef Operation *operation = piece.operation
    cdef Line *line = operation.line
    if line.given_up:
        return 1                    # reported already; the buffer is not ours any more
    if error[0]:
        operation.error = operation.error or error[0]
    elif piece.bounce != NULL:
        memcpy(piece.target, piece.bounce + piece.skip, piece.length_bytes)
    release_piece(line, piece)
    piece_counted(operation)
    return 1


cdef void release_piece(Line *line, Piece *piece) noexcept nogil:
    free(piece.bounce)
    piece.bounce = NULL
    piece.next = line.free_pieces
    line.free_pieces = piece


cdef void piece_counted(Operation *operation) noexcept nogil:
    operation.pieces -= 1
    if operation.pieces == 0:
        operation.next = operation.line.ended
        operation.line.ended = operation


cdef Piece *new_piece(Line *line) noexcept nogil:
    cdef Piece *piece = line.free_pieces
    if piece != NULL:
        line.free_pieces = piece.next
        return piece
    piece = <Piece *>calloc(1, sizeof(Piece))
    if piece != NULL:
        piece.chain = line.pieces
        line.pieces = piece
    return piece


cdef Operation *new_operation(Line *line) noexcept nogil:
    cdef Operation *operation = line.free_operations
    if operation != NULL:
        line.free_operations = operation.next
        return operation
    operation = <Operation *>calloc(1, sizeof(Operation))
    if operation != NULL:
        operation.line = line
        operation.chain = line.operations
        line.operations = operation
    return operation


cdef void unlist(Line *line, Operation *operation) noexcept nogil:
    if operation.older == NULL:
        line.oldest = operation.newer
    else:
        operation.older.newer = operation.newer
    if operation.newer == NULL:
        line.newest = operation.older
    else:
        operation.newer.older = operation.older
    operation.next = line.free_operations
    line.free_operations = operation


cdef void free_line(Line *line) noexcept nogil:
    """After nbd_close: until then libnbd knows the pieces."""
    cdef Piece *piece
    cdef Operation *operation
    while line.pieces != NULL:
        piece = line.pieces
        line.pieces = piece.chain
        free(piece.bounce)
        free(piece)
    while line.operations != NULL:
        operation = line.operations
        line.operations = operation.chain
        free(operation)
    free(line)


cdef void say_why(Line *line, const char *reason) noexcept nogil:
    strncpy(line.reason, reason, sizeof(line.reason) - 1)


cdef int note_extents(void *user, const char *context, uint64_t offset, uint32_t *entries, size_t count, int *error) noexcept nogil:
    cdef Extents *extents = <Extents *>user
    cdef uint32_t *grown
    if strcmp(context, LIBNBD_CONTEXT_BASE_ALLOCATION) != 0 or extents.count:
        return 0
    if count > extents.capacity:
        grown = <uint32_t *>realloc(extents.entries, count * sizeof(uint32_t))
        if grown == NULL:
            extents.no_memory = 1
            return 0
        extents.entries = grown
        extents.capacity = count
    memcpy(extents.entries, entries, count * sizeof(uint32_t))
    extents.count = count
    return 0

cdef uint64_t align_up(uint64_t value, uint64_t alignment) noexcept nogil:
    return (value + alignment - 1) & ~(alignment - 1)
