# SPDX-License-Identifier: Apache-2.0
# The kernels of _core.pyx that are C: CRC32C by three interleaved streams, counting bits, looking through words. Chosen once, when the
# module is imported, by what the processor has.
#
# Offers: ALL_ONES, fvd_count_words, fvd_crc_accelerated, fvd_crc_portable, fvd_crc_x86, fvd_highest_bit, fvd_kernels_init, fvd_lowest_bit,
#   fvd_popcount, fvd_skip_words
# Needs: nothing

cdef extern from *:
    """
    #include <stddef.h>
    #include <stdint.h>
    #include <string.h>
    #if defined(__x86_64__) && defined(__GNUC__)
    #include <immintrin.h>
    #define FVD_X86 1
    #else
    #define FVD_X86 0
    #endif

    #define FVD_CRC_POLYNOMIAL 0x82F63B78u   /* Castagnoli, reflected */

    /* Bytes of one of three interleaved streams: the CRC instruction takes three cycles but starts every cycle. 3 * 1360 + 8 = 4088 is a
       page after its 8 bytes of magic and checksum; 3 * 160 + 8 = 488 is most of a cell. */
    #define FVD_LONG_STREAM 1360
    #define FVD_SHORT_STREAM 160

    static uint32_t fvd_crc_table[8][256];
    static uint64_t fvd_crc_long[2], fvd_crc_short[2];
    static int fvd_crc_accelerated, fvd_popcnt_accelerated;

    static uint64_t fvd_load64(const uint8_t *p) { uint64_t v; memcpy(&v, p, 8); return v; }

    /* x^n modulo the polynomial, reflected. */
    static uint32_t fvd_crc_power(unsigned n) {
        uint32_t v = 0x80000000u;
        while (n--) v = (v >> 1) ^ ((v & 1) ? FVD_CRC_POLYNOMIAL : 0);
        return v;
    }

    static void fvd_kernels_init(void) {
        for (int i = 0; i < 256; i++) {
            uint32_t v = (uint32_t)i;
            for (int bit = 0; bit < 8; bit++) v = (v >> 1) ^ ((v & 1) ? FVD_CRC_POLYNOMIAL : 0);
            fvd_crc_table[0][i] = v;
        }
        for (int k = 1; k < 8; k++)
            for (int i = 0; i < 256; i++) {
                uint32_t v = fvd_crc_table[k - 1][i];
                fvd_crc_table[k][i] = (v >> 8) ^ fvd_crc_table[0][v & 255];
            }
        /* To move a CRC past n bytes is to multiply it by x^(8n); a reflected carry-less product is one bit short, and reducing it by the
           CRC instruction multiplies by x^32 more: hence 8n - 33. The 8 is the word that the product is XORed into. */
        fvd_crc_long[0] = fvd_crc_power((2 * FVD_LONG_STREAM + 8) * 8 - 33);
        fvd_crc_long[1] = fvd_crc_power((FVD_LONG_STREAM + 8) * 8 - 33);
        fvd_crc_short[0] = fvd_crc_power((2 * FVD_SHORT_STREAM + 8) * 8 - 33);
        fvd_crc_short[1] = fvd_crc_power((FVD_SHORT_STREAM + 8) * 8 - 33);
    #if FVD_X86
        __builtin_cpu_init();
        fvd_crc_accelerated = __builtin_cpu_supports("sse4.2") && __builtin_cpu_supports("pclmul");
        fvd_popcnt_accelerated = __builtin_cpu_supports("popcnt") != 0;
    #endif
    }

    /* Both CRC kernels work on the inverted register; the caller inverts. */
    static uint32_t fvd_crc_portable(uint32_t state, const uint8_t *p, size_t n) {
        for (; n >= 8; n -= 8, p += 8) {
            uint64_t v = fvd_load64(p) ^ state;
            state = fvd_crc_table[7][v & 255] ^ fvd_crc_table[6][(v >> 8) & 255] ^ fvd_crc_table[5][(v >> 16) & 255]
                  ^ fvd_crc_table[4][(v >> 24) & 255] ^ fvd_crc_table[3][(v >> 32) & 255] ^ fvd_crc_table[2][(v >> 40) & 255]
                  ^ fvd_crc_table[1][(v >> 48) & 255] ^ fvd_crc_table[0][v >> 56];
        }
        while (n--) state = (state >> 8) ^ fvd_crc_table[0][(state ^ *p++) & 255];
        return state;
    }

    #if FVD_X86
    __attribute__((target("sse4.2,pclmul"), always_inline))
    static inline uint64_t fvd_crc_streams(uint64_t a, const uint8_t *p, size_t stream, const uint64_t *shift) {
        uint64_t b = 0, c = 0;
        for (size_t i = 0; i < stream; i += 8) {
            a = _mm_crc32_u64(a, fvd_load64(p + i));
            b = _mm_crc32_u64(b, fvd_load64(p + stream + i));
            c = _mm_crc32_u64(c, fvd_load64(p + 2 * stream + i));
        }
        __m128i moved = _mm_xor_si128(
            _mm_clmulepi64_si128(_mm_cvtsi64_si128((long long)a), _mm_cvtsi64_si128((long long)shift[0]), 0),
            _mm_clmulepi64_si128(_mm_cvtsi64_si128((long long)b), _mm_cvtsi64_si128((long long)shift[1]), 0));
        return _mm_crc32_u64(c, fvd_load64(p + 3 * stream) ^ (uint64_t)_mm_cvtsi128_si64(moved));
    }

    __attribute__((target("sse4.2,pclmul")))
    static uint32_t fvd_crc_x86(uint32_t state, const uint8_t *p, size_t n) {
        uint64_t a = state;
        for (; n >= 3 * FVD_LONG_STREAM + 8; n -= 3 * FVD_LONG_STREAM + 8, p += 3 * FVD_LONG_STREAM + 8)
            a = fvd_crc_streams(a, p, FVD_LONG_STREAM, fvd_crc_long);
        for (; n >= 3 * FVD_SHORT_STREAM + 8; n -= 3 * FVD_SHORT_STREAM + 8, p += 3 * FVD_SHORT_STREAM + 8)
            a = fvd_crc_streams(a, p, FVD_SHORT_STREAM, fvd_crc_short);
        for (; n >= 8; n -= 8, p += 8) a = _mm_crc32_u64(a, fvd_load64(p));
        while (n--) a = _mm_crc32_u8((uint32_t)a, *p++);
        return (uint32_t)a;
    }

    __attribute__((target("popcnt")))
    static uint64_t fvd_count_popcnt(const uint64_t *w, size_t n) {
        uint64_t a = 0, b = 0, c = 0, d = 0;
        for (; n >= 4; n -= 4, w += 4) {
            a += (uint64_t)__builtin_popcountll(w[0]);
            b += (uint64_t)__builtin_popcountll(w[1]);
            c += (uint64_t)__builtin_popcountll(w[2]);
            d += (uint64_t)__builtin_popcountll(w[3]);
        }
        while (n--) a += (uint64_t)__builtin_popcountll(*w++);
        return a + b + c + d;
    }
    #else
    static uint32_t fvd_crc_x86(uint32_t state, const uint8_t *p, size_t n) { return fvd_crc_portable(state, p, n); }
    #endif

    static uint64_t fvd_count_words(const uint64_t *w, size_t n) {
    #if FVD_X86
        if (fvd_popcnt_accelerated) return fvd_count_popcnt(w, n);
    #endif
        uint64_t total = 0;
        while (n--) total += (uint64_t)__builtin_popcountll(*w++);
        return total;
    }

    /* First index in [i, n) whose word is not `pattern`, or n. Eight words at a time, so that the compiler uses vectors. */
    static size_t fvd_skip_words(const uint64_t *w, size_t i, size_t n, uint64_t pattern) {
        for (; i + 8 <= n; i += 8) {
            uint64_t different = 0;
            for (int k = 0; k < 8; k++) different |= w[i + k] ^ pattern;
            if (different) break;
        }
        while (i < n && w[i] == pattern) i++;
        return i;
    }

    #define FVD_ALL_ONES UINT64_C(0xFFFFFFFFFFFFFFFF)
    static int fvd_lowest_bit(uint64_t v) { return __builtin_ctzll(v); }
    static int fvd_highest_bit(uint64_t v) { return 63 - __builtin_clzll(v); }
    static int fvd_popcount(uint64_t v) { return __builtin_popcountll(v); }
    """
    const uint64_t ALL_ONES "FVD_ALL_ONES"
    int fvd_crc_accelerated
    void fvd_kernels_init() noexcept nogil
    uint32_t fvd_crc_portable(uint32_t state, const uint8_t *p, size_t n) noexcept nogil
    uint32_t fvd_crc_x86(uint32_t state, const uint8_t *p, size_t n) noexcept nogil
    uint64_t fvd_count_words(const uint64_t *w, size_t n) noexcept nogil
    size_t fvd_skip_words(const uint64_t *w, size_t i, size_t n, uint64_t pattern) noexcept nogil
    int fvd_lowest_bit(uint64_t v) noexcept nogil
    int fvd_highest_bit(uint64_t v) noexcept nogil
    int fvd_popcount(uint64_t v) noexcept nogil
