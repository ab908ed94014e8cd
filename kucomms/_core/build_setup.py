# SPDX-License-Identifier: MIT
"""Builds kucomms._core._setup: what happens once per link, through cffi.

These calls drop the GIL: mapping, creating shared memory, and the turns of a pool's
io_uring, which are one call for many transfers. What runs per message is in _ring.c.
"""

from pathlib import Path

from cffi import FFI

HERE = Path(__file__).resolve().parent
INCLUDE = HERE.parent / "include"

ffi = FFI()

ffi.cdef("""
    #define KUCOMMS_MAGIC ...
    #define KUCOMMS_ABI_VERSION ...
    #define KUCOMMS_FEATURES ...
    #define KUCOMMS_FEATURE_TURNS ...
    #define KUCOMMS_FEATURE_POOLS ...
    #define KUCOMMS_NAME_MAX ...
    #define KUCOMMS_HELLO_MAX ...
    #define KUCOMMS_SETUP_NUMBER ...
    #define KUCOMMS_POOL_CONTIGUOUS ...
    #define KUCOMMS_POOL_CONTIGUOUS_MAX ...
    #define KUCOMMS_STEP_HELLO ...
    #define KUCOMMS_STEP_SETUP ...
    #define KUCOMMS_STEP_ATTACH ...
    #define KUCOMMS_STEP_POOL ...
    #define KUCOMMS_STEP_MAPPED ...
    #define KUCOMMS_SEALED ...
    #define KUCOMMS_EVENTFDS ...
    #define KUCOMMS_RENDEZVOUS_FLAGS ...
    #define KUCOMMS_DOORBELL ...
    #define KUCOMMS_ACCEPTED ...
    #define KUCOMMS_REFUSED_BUSY ...
    #define KUCOMMS_REFUSED_VERSION ...
    #define KUCOMMS_REFUSED_MEMORY ...
    #define KUCOMMS_REFUSED_USER ...

    struct kucomms_rendezvous {
        uint64_t magic;
        uint32_t version;
        uint32_t step;
        uint64_t features;
        uint64_t ring_size;
        uint32_t status;
        uint32_t flags;
        uint32_t hello_length;
        uint32_t pool;
        uint8_t hello[64];
    };

    struct kucomms_setup {
        uint32_t version;
        uint32_t hello_length;
        uint64_t features;
        uint64_t ring_size;
        uint64_t page_size;
        uint64_t side_size;
        uint64_t side_offset[2];
        uint8_t hello[64];
        uint32_t flags;
        uint32_t channel;
        uint64_t reserved[7];
    };

    struct kucomms_channel { ...; };

    uint64_t kucomms_ring_size(uint64_t asked);
    uint64_t kucomms_side_size(uint64_t ring_size);
    uint64_t kucomms_message_max(uint64_t ring_size);

    int setup_ioctl(int fd, struct kucomms_setup *setup);
    int setup_open_pool(int fd, uint64_t size, uint32_t flags, uint32_t *number,
                        uint64_t *offset);
    int setup_close_pool(int fd, uint32_t number);
    int setup_shm_create(const char *name);
    int setup_shm_unlink(const char *name);
    struct kucomms_channel *setup_channel_new(uint32_t own, uint64_t ring_size,
                                              uint64_t features, int fd,
                                              uint64_t offset, int *err);
    int kucomms_channel_attach(struct kucomms_channel *channel, int fd,
                               uint64_t offset);
    void setup_channel_free(struct kucomms_channel *channel);
    intptr_t setup_map(int fd, size_t size, int64_t offset);
    void setup_populate(uintptr_t at, size_t size);
    int setup_unmap(uintptr_t at, size_t size);
    int setup_fill_hole(uintptr_t at, size_t size);
    ssize_t setup_message(int fd, int fills, uintptr_t pieces, size_t count);
    int setup_drop_message(int fd);

    #define URING_FIXED_MAX ...
    #define IORING_OP_READV ...
    #define IORING_OP_WRITEV ...
    #define IORING_OP_READ_FIXED ...
    #define IORING_OP_WRITE_FIXED ...
    #define IORING_OP_SENDMSG ...
    #define IORING_OP_RECVMSG ...
    #define IORING_OP_ASYNC_CANCEL ...
    #define IORING_OP_READ ...
    #define IORING_OP_WRITE ...
    #define IORING_OP_SEND ...
    #define IORING_OP_RECV ...

    struct uring { int fd; int eventfd; unsigned int entries; unsigned int pending; ...; };

    struct uring *uring_new(unsigned int entries, unsigned int completions,
                            int *err);
    int uring_register(struct uring *ring, uintptr_t at, size_t size);
    int uring_turn(struct uring *ring, const void *sqes, unsigned int count,
                   void *cqes, unsigned int room, int *more);
    void uring_free(struct uring *ring);
""")

ffi.set_source(
    "kucomms._core._setup",
    r"""
    #include <fcntl.h>
    #include <stdlib.h>
    #include <sys/ioctl.h>
    #include <sys/mman.h>
    #include <sys/socket.h>
    #include <sys/stat.h>
    #include <kucomms/channel.h>
    #include <kucomms/rendezvous.h>
    #include "uring.h"

    /* A new object, 0600, closed on exec. Return: descriptor or -errno. */
    static int setup_shm_create(const char *name)
    {
        int fd = shm_open(name, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);

        return fd < 0 ? -errno : fd;
    }

    static int setup_ioctl(int fd, struct kucomms_setup *setup)
    {
        int err;

        do {
            err = ioctl(fd, KUCOMMS_IOC_SETUP, setup);
        } while (err && errno == EINTR);
        return err ? errno : 0;
    }

    static int setup_open_pool(int fd, uint64_t size, uint32_t flags,
                               uint32_t *number, uint64_t *offset)
    {
        struct kucomms_pool_request request = { .size = size, .flags = flags };

        if (ioctl(fd, KUCOMMS_IOC_OPEN_POOL, &request))
            return errno;
        *number = request.number;
        *offset = request.offset;
        return 0;
    }

    static int setup_close_pool(int fd, uint32_t number)
    {
        struct kucomms_pool_request request = { .number = number };

        return ioctl(fd, KUCOMMS_IOC_CLOSE_POOL, &request) ? errno : 0;
    }

    static int setup_shm_unlink(const char *name)
    {
        return shm_unlink(name) ? -errno : 0;
    }

    static struct kucomms_channel *
    setup_channel_new(uint32_t own, uint64_t ring_size, uint64_t features,
                      int fd, uint64_t offset, int *err)
    {
        struct kucomms_channel *channel = malloc(sizeof(*channel));

        if (!channel) {
            *err = -ENOMEM;
            return NULL;
        }
        *err = kucomms_channel_init(channel, own, ring_size, features, fd,
                                    offset);
        if (*err) {
            free(channel);
            return NULL;
        }
        return channel;
    }

    static void setup_channel_free(struct kucomms_channel *channel)
    {
        kucomms_channel_destroy(channel);
        free(channel);
    }

    /* Not for a forked child. Return: where, or -errno. */
    static intptr_t setup_map(int fd, size_t size, int64_t offset)
    {
        void *at = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, offset);

        if (at == MAP_FAILED)
            return -errno;
        if (madvise(at, size, MADV_DONTFORK)) {
            int err = -errno;

            munmap(at, size);
            return err;
        }
        return (intptr_t)at;
    }

    /* Touch pages that are allocated. A kernel before 5.14 leaves it to who uses them. */
    static void setup_populate(uintptr_t at, size_t size)
    {
    #ifdef MADV_POPULATE_WRITE
        madvise((void *)at, size, MADV_POPULATE_WRITE);
    #endif
    }

    static int setup_unmap(uintptr_t at, size_t size)
    {
        return munmap((void *)at, size) ? -errno : 0;
    }

    /* After a fork, where the parent has what the child must not have. */
    static int setup_fill_hole(uintptr_t at, size_t size)
    {
        void *pages = mmap((void *)at, size, PROT_READ | PROT_WRITE,
                           MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE,
                           -1, 0);

        return pages == MAP_FAILED ? -errno : 0;
    }

    /* Through a socket, without waiting. @pieces: struct iovec. Return: bytes, or -errno. */
    static ssize_t setup_message(int fd, int fills, uintptr_t pieces, size_t count)
    {
        struct msghdr header = {
            .msg_iov = (struct iovec *)pieces,
            .msg_iovlen = count,
        };
        ssize_t moved = fills ? recvmsg(fd, &header, MSG_DONTWAIT) :
                                sendmsg(fd, &header, MSG_DONTWAIT | MSG_NOSIGNAL);

        return moved < 0 ? -errno : moved;
    }

    static int setup_drop_message(int fd)
    {
        char byte;

        return recv(fd, &byte, sizeof(byte), MSG_DONTWAIT | MSG_TRUNC) < 0 ? -errno : 0;
    }
    """,
    include_dirs=[str(INCLUDE), str(HERE)],
    depends=[str(path) for path in [*sorted(INCLUDE.rglob("*.h")), HERE / "uring.h"]],
    extra_compile_args=["-std=gnu11", "-Wall", "-Wextra"],
    py_limited_api=True,
)

if __name__ == "__main__":
    ffi.compile(verbose=True)
