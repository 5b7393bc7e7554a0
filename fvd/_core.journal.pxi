# SPDX-License-Identifier: Apache-2.0
# Journal pages: laid out and sealed, judged, applied. FORMAT.md section 6. One encoder for the engine and for fvd.format.
#
# Offers: journal_append, journal_header_layout, journal_seal
# Needs: _core: checksum

cdef bint journal_append(JournalPages *commit, uint32_t kind, uint32_t index, uint64_t value) noexcept nogil:
    cdef uint32_t size = WORD_RECORD_BYTES if kind == KIND_BITMAP else ENTRY_RECORD_BYTES
    cdef uint8_t *page
    cdef uint8_t *record
    if commit.pages == 0 or commit.used_bytes + size > JOURNAL_RECORDS_BYTES:
        if commit.pages == commit.pages_max:
            return False
        memset(commit.out + commit.pages * PAGE_BYTES, 0, JOURNAL_HEADER_BYTES if BUG(Bug.PAGE_NOT_CLEARED) else PAGE_BYTES)
        commit.pages += 1
        commit.used_bytes = 0
    page = commit.out + (commit.pages - 1) * PAGE_BYTES
    record = page + JOURNAL_HEADER_BYTES + commit.used_bytes
    memcpy(record, &index, 4)
    if kind == KIND_BITMAP:
        memcpy(record + 4, &value, 8)
        (<JournalHeader *>page).word_count += 1
    else:
        memcpy(record + 4, &value, 4)       # the lower half: the machine is little-endian
        (<JournalHeader *>page).entry_count += 1
    commit.used_bytes += size
    return True


cdef void journal_seal(uint8_t *out, uint32_t pages, const JournalSeal *seal) noexcept nogil:
    cdef JournalHeader *header
    cdef uint8_t *page
    cdef uint32_t part
    for part in range(pages):
        page = out + part * PAGE_BYTES
        header = <JournalHeader *>page
        header.page_magic = JOURNAL_MAGIC
        header.sequence = seal.sequence + part
        header.previous = seal.previous
        header.tail = seal.tail
        header.map_hash = seal.map_hash
        header.part = <uint16_t>part
        header.parts = <uint16_t>pages
        header.flags = seal.flags
        header.page_checksum = checksum(seal.uuid_crc, seal.journal_offset_bytes + ((seal.sequence + part) % seal.ring_pages) * PAGE_BYTES,
                                        page, PAGE_BYTES, JOURNAL_CHECKSUM_OFFSET)


cdef inline uint64_t records_capacity(uint64_t position, uint64_t ring_pages) noexcept nogil:
    """Bytes that the records of the page at this ring position may take."""
    return (ring_pages - position) * PAGE_BYTES - JOURNAL_HEADER_BYTES if BUG(Bug.RECORDS_BEYOND_THE_PAGE) else JOURNAL_RECORDS_BYTES


cdef inline bint records_fit(const JournalHeader *header, uint64_t capacity_bytes) noexcept nogil:
    return <uint64_t>header.word_count * WORD_RECORD_BYTES + <uint64_t>header.entry_count * ENTRY_RECORD_BYTES <= capacity_bytes


cdef bint journal_page_valid(const uint8_t *page, uint32_t uuid_crc, uint64_t journal_offset_bytes, uint64_t position,
                             uint64_t ring_pages) noexcept nogil:
    cdef const JournalHeader *header = <const JournalHeader *>page
    if header.page_magic != JOURNAL_MAGIC or header.sequence % ring_pages != position:
        return False
    if header.part >= header.parts or header.sequence <= header.part:
        return False
    if not records_fit(header, records_capacity(position, ring_pages)):
        return False
    return BUG(Bug.PAGE_CHECKSUM_IGNORED) or header.page_checksum == checksum(
        uuid_crc, journal_offset_bytes + position * PAGE_BYTES, page, PAGE_BYTES, JOURNAL_CHECKSUM_OFFSET)


cdef inline uint32_t record_index(const uint8_t *record) noexcept nogil:
    cdef uint32_t index
    memcpy(&index, record, 4)
    return index


cdef bint journal_page_in_range(const uint8_t *page, uint64_t capacity_bytes, uint64_t words, uint64_t entries) noexcept nogil:
    cdef const JournalHeader *header = <const JournalHeader *>page
    cdef const uint8_t *record = page + JOURNAL_HEADER_BYTES
    cdef uint32_t _i
    if not records_fit(header, capacity_bytes):
        return False
    for _i in range(header.word_count):
        if record_index(record) >= words:
            return False
        record += WORD_RECORD_BYTES
    for _i in range(header.entry_count):
        if record_index(record) >= entries:
            return False
        record += ENTRY_RECORD_BYTES
    return True


cdef void journal_page_apply(const uint8_t *page, uint64_t *words, uint32_t *entries, uint8_t *dirty_words,
                             uint8_t *dirty_entries) noexcept nogil:
    """The caller has checked the page with journal_page_in_range."""
    cdef const JournalHeader *header = <const JournalHeader *>page
    cdef const uint8_t *record = page + JOURNAL_HEADER_BYTES
    cdef uint32_t _i, index
    for _i in range(header.word_count):
        index = record_index(record)
        memcpy(&words[index], record + 4, 8)
        dirty_words[index / WORDS_PER_PAGE] = 1
        record += WORD_RECORD_BYTES
    for _i in range(header.entry_count):
        index = record_index(record)
        memcpy(&entries[index], record + 4, 4)
        dirty_entries[index / ENTRIES_PER_PAGE] = 1
        record += ENTRY_RECORD_BYTES


# For Python.

def journal_scan(const uint8_t[::1] ring not None, const uint8_t[::1] uuid not None, uint64_t journal_offset_bytes,
                 uint8_t[:, ::1] headers_out not None):
    """Copy the header of every valid page to its row, zeros for the others (no valid page has sequence 0): number of valid pages."""
    cdef uint64_t i
    cdef uint64_t pages = <uint64_t>ring.shape[0] / PAGE_BYTES
    cdef uint64_t valid = 0
    cdef uint32_t uuid_crc = uuid_crc_of(uuid)
    if pages == 0 or ring.shape[0] % PAGE_BYTES:
        raise ValueError(f"{ring.shape[0]} bytes are not whole pages of a ring")
    if <uint64_t>headers_out.shape[0] != pages or headers_out.shape[1] != JOURNAL_HEADER_BYTES:
        raise ValueError(f"headers_out must be {pages} rows of {JOURNAL_HEADER_BYTES} bytes")
    with nogil:
        for i in range(pages):
            if journal_page_valid(&ring[i * PAGE_BYTES], uuid_crc, journal_offset_bytes, i, pages):
                memcpy(&headers_out[i, 0], &ring[i * PAGE_BYTES], JOURNAL_HEADER_BYTES)
                valid += 1
            else:
                memset(&headers_out[i, 0], 0, JOURNAL_HEADER_BYTES)
    return valid


def journal_apply(const uint8_t[::1] ring not None, const uint64_t[::1] positions not None, uint64_t[::1] bitmap not None,
                  uint32_t[::1] table, uint8_t[::1] dirty_bitmap_pages not None, uint8_t[::1] dirty_table_pages not None):
    """Apply the records of the pages at these ring positions, in order: -1, or the index in `positions` of the first page that names
    a word or entry outside the maps; that page and those after it are not applied."""
    cdef uint64_t i
    cdef uint64_t count = <uint64_t>positions.shape[0]
    cdef uint64_t pages = <uint64_t>ring.shape[0] / PAGE_BYTES
    cdef uint64_t words = <uint64_t>bitmap.shape[0]
    cdef uint64_t entries = 0 if table is None else <uint64_t>table.shape[0]
    cdef uint64_t *word_data = &bitmap[0] if words else NULL
    cdef uint32_t *entry_data = &table[0] if entries else NULL
    cdef uint8_t *dirty_words = &dirty_bitmap_pages[0] if dirty_bitmap_pages.shape[0] else NULL
    cdef uint8_t *dirty_entries = &dirty_table_pages[0] if dirty_table_pages.shape[0] else NULL
    cdef int64_t result = -1
    if (<uint64_t>dirty_bitmap_pages.shape[0] * WORDS_PER_PAGE < words
            or <uint64_t>dirty_table_pages.shape[0] * ENTRIES_PER_PAGE < entries):
        raise ValueError("the dirty arrays need one byte per page of their map")
    for i in range(count):
        if positions[i] >= pages:
            raise ValueError(f"ring position {positions[i]} of {pages}")
    with nogil:
        for i in range(count):
            if not journal_page_in_range(&ring[positions[i] * PAGE_BYTES], records_capacity(positions[i], pages), words, entries):
                result = <int64_t>i
                break
            journal_page_apply(&ring[positions[i] * PAGE_BYTES], word_data, entry_data, dirty_words, dirty_entries)
    return result


def journal_parts(uint64_t words, uint64_t entries):
    """Pages that a commit of so many records takes (at least one)."""
    cdef uint64_t per_page_words = JOURNAL_RECORDS_BYTES / WORD_RECORD_BYTES
    cdef uint64_t per_page_entries = JOURNAL_RECORDS_BYTES / ENTRY_RECORD_BYTES
    cdef uint64_t parts = (words + per_page_words - 1) / per_page_words
    cdef uint64_t capacity = (parts * per_page_words - words) * WORD_RECORD_BYTES / ENTRY_RECORD_BYTES
    if entries > capacity:
        parts += (entries - capacity + per_page_entries - 1) / per_page_entries
    return parts if parts else 1


def journal_encode(const uint8_t[::1] words not None, const uint8_t[::1] entries not None, const uint8_t[::1] uuid not None,
                   uint64_t journal_offset_bytes, uint64_t ring_pages, uint64_t sequence, uint64_t previous, uint64_t tail,
                   uint64_t map_hash_after, uint32_t flags, uint8_t[::1] out not None):
    """Build the sealed pages of one commit into `out`: word records first, then entry records, each as packed bytes."""
    cdef uint64_t word_count = <uint64_t>words.shape[0] / WORD_RECORD_BYTES
    cdef uint64_t entry_count = <uint64_t>entries.shape[0] / ENTRY_RECORD_BYTES
    cdef uint64_t parts = journal_parts(word_count, entry_count)
    cdef uint64_t i, value
    cdef uint32_t value32
    cdef JournalPages commit
    cdef JournalSeal seal
    if words.shape[0] % WORD_RECORD_BYTES or entries.shape[0] % ENTRY_RECORD_BYTES:
        raise ValueError("records must be whole")
    if parts > 0xFFFF or <uint64_t>out.shape[0] != parts * PAGE_BYTES:
        raise ValueError(f"the commit takes {parts} pages; out has {out.shape[0]} bytes")
    if ring_pages == 0 or sequence == 0 or sequence + parts < sequence or sequence % ring_pages + parts > ring_pages:
        raise ValueError(f"{parts} pages from sequence {sequence} do not fit before the end of a ring of {ring_pages}")
    commit.out = &out[0]
    commit.pages_max = <uint32_t>parts
    commit.pages = commit.used_bytes = 0
    seal.uuid_crc = uuid_crc_of(uuid)
    seal.journal_offset_bytes = journal_offset_bytes
    seal.ring_pages = ring_pages
    seal.sequence = sequence
    seal.previous = previous
    seal.tail = tail
    seal.map_hash = map_hash_after
    seal.flags = flags
    with nogil:
        memset(commit.out, 0, PAGE_BYTES)       # it may have no record
        for i in range(word_count):
            memcpy(&value, &words[i * WORD_RECORD_BYTES + 4], 8)
            journal_append(&commit, KIND_BITMAP, record_index(&words[i * WORD_RECORD_BYTES]), value)
        for i in range(entry_count):
            memcpy(&value32, &entries[i * ENTRY_RECORD_BYTES + 4], 4)
            journal_append(&commit, KIND_TABLE, record_index(&entries[i * ENTRY_RECORD_BYTES]), value32)
        journal_seal(commit.out, commit.pages_max, &seal)
    return None


cdef dict journal_header_layout():
    cdef JournalHeader header
    cdef char *base = <char *>&header
    return {
        "page_magic": (<char *>&header.page_magic - base, sizeof(header.page_magic)),
        "page_checksum": (<char *>&header.page_checksum - base, sizeof(header.page_checksum)),
        "sequence": (<char *>&header.sequence - base, sizeof(header.sequence)),
        "previous": (<char *>&header.previous - base, sizeof(header.previous)),
        "tail": (<char *>&header.tail - base, sizeof(header.tail)),
        "map_hash": (<char *>&header.map_hash - base, sizeof(header.map_hash)),
        "part": (<char *>&header.part - base, sizeof(header.part)),
        "parts": (<char *>&header.parts - base, sizeof(header.parts)),
        "word_count": (<char *>&header.word_count - base, sizeof(header.word_count)),
        "entry_count": (<char *>&header.entry_count - base, sizeof(header.entry_count)),
        "flags": (<char *>&header.flags - base, sizeof(header.flags)),
        "page_reserved": (<char *>&header.page_reserved - base, sizeof(header.page_reserved)),
    }
