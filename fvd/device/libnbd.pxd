# SPDX-License-Identifier: Apache-2.0
"""What we use of libnbd's C interface, an NBD client: see libnbd(3) and a manual page per function. Declarations only."""

from libc.stdint cimport int64_t, uint32_t, uint64_t

cdef extern from "<libnbd.h>" nogil:
    cdef struct nbd_handle:
        pass
    ctypedef struct nbd_completion_callback:
        int (*callback)(void *user, int *error) noexcept nogil
        void *user_data
        void (*free)(void *user) noexcept nogil
    ctypedef struct nbd_extent_callback:
        int (*callback)(void *user, const char *context, uint64_t offset, uint32_t *entries, size_t count, int *error) noexcept nogil
        void *user_data
        void (*free)(void *user) noexcept nogil
    const int LIBNBD_SIZE_MINIMUM, LIBNBD_SIZE_MAXIMUM
    const unsigned LIBNBD_AIO_DIRECTION_READ, LIBNBD_AIO_DIRECTION_WRITE
    const uint32_t LIBNBD_STRICT_ALIGN, LIBNBD_STATE_ZERO, LIBNBD_ALLOW_TRANSPORT_TCP, LIBNBD_ALLOW_TRANSPORT_UNIX
    const char *LIBNBD_CONTEXT_BASE_ALLOCATION
    nbd_handle *nbd_create()
    void nbd_close(nbd_handle *h)
    const char *nbd_get_error()
    int nbd_get_errno()
    int nbd_supports_tls(nbd_handle *h)
    int nbd_add_meta_context(nbd_handle *h, const char *name)
    int nbd_can_meta_context(nbd_handle *h, const char *name)
    int nbd_set_uri_allow_transports(nbd_handle *h, uint32_t mask)
    int nbd_set_uri_allow_local_file(nbd_handle *h, bint allow)
    uint32_t nbd_get_strict_mode(nbd_handle *h)
    int nbd_set_strict_mode(nbd_handle *h, uint32_t flags)
    int nbd_aio_connect_uri(nbd_handle *h, const char *uri)
    int nbd_aio_connect_systemd_socket_activation(nbd_handle *h, char **argv)
    int nbd_aio_disconnect(nbd_handle *h, uint32_t flags)
    int nbd_kill_subprocess(nbd_handle *h, int signal)
    int nbd_poll(nbd_handle *h, int timeout_ms)
    int nbd_aio_is_ready(nbd_handle *h)
    int nbd_aio_is_processing(nbd_handle *h)
    int nbd_aio_is_dead(nbd_handle *h)
    int nbd_aio_is_closed(nbd_handle *h)
    int nbd_aio_get_fd(nbd_handle *h)
    unsigned nbd_aio_get_direction(nbd_handle *h)
    int nbd_aio_notify_read(nbd_handle *h)
    int nbd_aio_notify_write(nbd_handle *h)
    int nbd_aio_command_completed(nbd_handle *h, uint64_t cookie)
    int64_t nbd_get_size(nbd_handle *h)
    int64_t nbd_get_block_size(nbd_handle *h, int which)
    int64_t nbd_aio_pread(nbd_handle *h, void *buffer, size_t count, uint64_t offset, nbd_completion_callback ended, uint32_t flags)
    int64_t nbd_aio_block_status(nbd_handle *h, uint64_t count, uint64_t offset, nbd_extent_callback extents,
                                 nbd_completion_callback ended, uint32_t flags)
