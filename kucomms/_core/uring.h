/* SPDX-License-Identifier: MIT */
/*
 * io_uring, as much of it as a pool needs: the entries of a turn of the loop
 * go to the kernel, and the completions come back, in one io_uring_enter().
 *
 * One thread uses a ring, and the kernel writes into it only while that thread
 * is inside of the call (IORING_SETUP_DEFER_TASKRUN, Linux 6.1), so no other
 * system call of the program is ever interrupted by it. That it has something
 * to do there is said by an eventfd: newer kernels do not wake who polls the
 * ring itself for that.
 */
#ifndef KUCOMMS_URING_H
#define KUCOMMS_URING_H

#include <errno.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#include <linux/io_uring.h>

/* Registered buffers have at most so many bytes. */
#define URING_FIXED_MAX (1UL << 30)

struct uring {
	int fd;
	int eventfd;			/* readable: a turn is due */
	unsigned int entries;
	unsigned int pending;		/* of those, not taken by the kernel */
	unsigned int sq_tail;
	unsigned int *sq_khead, *sq_ktail, *sq_kflags;
	unsigned int *cq_khead, *cq_ktail;
	unsigned int sq_mask, cq_mask;
	struct io_uring_sqe *sqes;
	struct io_uring_cqe *cqes;
	void *rings;
	size_t rings_size, sqes_size;
};

static void uring_free(struct uring *ring)
{
	if (ring->sqes)
		munmap(ring->sqes, ring->sqes_size);
	if (ring->rings)
		munmap(ring->rings, ring->rings_size);
	if (ring->fd >= 0)
		close(ring->fd);
	if (ring->eventfd >= 0)
		close(ring->eventfd);
	free(ring);
}

static void *uring_map(int fd, size_t size, off_t offset)
{
	void *at = mmap(NULL, size, PROT_READ | PROT_WRITE,
			MAP_SHARED | MAP_POPULATE, fd, offset);

	if (at == MAP_FAILED)
		return NULL;
	madvise(at, size, MADV_DONTFORK);
	return at;
}

/* Room for @entries at once, and for @completions. Return: NULL with -errno in *@err. */
static struct uring *uring_new(unsigned int entries, unsigned int completions,
			       int *err)
{
	struct io_uring_params params = {
		.flags = IORING_SETUP_CQSIZE | IORING_SETUP_SUBMIT_ALL |
			 IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN |
			 IORING_SETUP_TASKRUN_FLAG,
		.cq_entries = completions,
	};
	struct uring *ring = calloc(1, sizeof(*ring));
	unsigned int *array, i;
	size_t cq_size;
	char *rings;

	*err = -ENOMEM;
	if (!ring)
		return NULL;
	ring->eventfd = -1;
	ring->fd = (int)syscall(__NR_io_uring_setup, entries, &params);
	if (ring->fd >= 0)
		ring->eventfd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	if (ring->fd < 0 || ring->eventfd < 0 ||
	    syscall(__NR_io_uring_register, ring->fd, IORING_REGISTER_EVENTFD,
		    &ring->eventfd, 1) < 0) {
		*err = -errno;
		goto err_free;
	}
	*err = -EINVAL;
	if (!(params.features & IORING_FEAT_SINGLE_MMAP) ||
	    !(params.features & IORING_FEAT_NODROP) ||
	    !(params.features & IORING_FEAT_SUBMIT_STABLE))
		goto err_free;

	ring->rings_size = params.sq_off.array + params.sq_entries * sizeof(*array);
	cq_size = params.cq_off.cqes + params.cq_entries * sizeof(*ring->cqes);
	if (ring->rings_size < cq_size)
		ring->rings_size = cq_size;
	ring->sqes_size = params.sq_entries * sizeof(*ring->sqes);
	*err = -ENOMEM;
	ring->rings = uring_map(ring->fd, ring->rings_size, IORING_OFF_SQ_RING);
	ring->sqes = uring_map(ring->fd, ring->sqes_size, IORING_OFF_SQES);
	if (!ring->rings || !ring->sqes)
		goto err_free;

	rings = ring->rings;
	ring->entries = params.sq_entries;
	ring->sq_mask = params.sq_entries - 1;
	ring->cq_mask = params.cq_entries - 1;
	ring->sq_khead = (unsigned int *)(rings + params.sq_off.head);
	ring->sq_ktail = (unsigned int *)(rings + params.sq_off.tail);
	ring->sq_kflags = (unsigned int *)(rings + params.sq_off.flags);
	ring->cq_khead = (unsigned int *)(rings + params.cq_off.head);
	ring->cq_ktail = (unsigned int *)(rings + params.cq_off.tail);
	ring->cqes = (struct io_uring_cqe *)(rings + params.cq_off.cqes);
	array = (unsigned int *)(rings + params.sq_off.array);
	for (i = 0; i < params.sq_entries; i++)
		array[i] = i;
	*err = 0;
	return ring;

err_free:
	uring_free(ring);
	return NULL;
}

/* Pin @size bytes at @at once for all transfers, a buffer for each URING_FIXED_MAX. */
static int uring_register(struct uring *ring, uintptr_t at, size_t size)
{
	unsigned int count = (size + URING_FIXED_MAX - 1) / URING_FIXED_MAX, i;
	struct iovec *iov = calloc(count, sizeof(*iov));
	int err;

	if (!iov)
		return -ENOMEM;
	for (i = 0; i < count; i++, at += URING_FIXED_MAX, size -= URING_FIXED_MAX) {
		iov[i].iov_base = (void *)at;
		iov[i].iov_len = size < URING_FIXED_MAX ? size : URING_FIXED_MAX;
	}
	err = syscall(__NR_io_uring_register, ring->fd, IORING_REGISTER_BUFFERS,
		      iov, count) < 0 ? -errno : 0;
	free(iov);
	return err;
}

/*
 * Hand over @count entries, let the kernel work, and take up to @room
 * completions. Return: how many completions, or -errno when the kernel took
 * nothing for now. Entries that it has not taken go with the next turn, and
 * there is no room for so many until then: see pending. *@more: whether
 * another turn is due at once; else the eventfd says when.
 */
static int uring_turn(struct uring *ring, const void *sqes, unsigned int count,
		      void *cqes, unsigned int room, int *more)
{
	struct io_uring_cqe *taken = cqes;
	unsigned int head, tail, n, i;
	uint64_t bells;
	int err = 0;

	*more = 0;
	if (count > ring->entries - ring->pending)
		return -EINVAL;
	for (i = 0; i < count; i++)
		memcpy(&ring->sqes[(ring->sq_tail + i) & ring->sq_mask],
		       (const struct io_uring_sqe *)sqes + i, sizeof(*ring->sqes));
	ring->sq_tail += count;
	/* pairs with the kernel's acquire when it looks for entries */
	__atomic_store_n(ring->sq_ktail, ring->sq_tail, __ATOMIC_RELEASE);

	if (syscall(__NR_io_uring_enter, ring->fd, ring->pending + count, 0,
		    IORING_ENTER_GETEVENTS, NULL, 0) < 0)
		err = -errno;
	/* pairs with the kernel's release when it has read entries */
	ring->pending = ring->sq_tail - __atomic_load_n(ring->sq_khead, __ATOMIC_ACQUIRE);

	head = *ring->cq_khead;
	/* pairs with the kernel's release when it has written completions */
	tail = __atomic_load_n(ring->cq_ktail, __ATOMIC_ACQUIRE);
	n = tail - head < room ? tail - head : room;
	for (i = 0; i < n; i++)
		taken[i] = ring->cqes[(head + i) & ring->cq_mask];
	/* pairs with the kernel's acquire when it looks for room */
	__atomic_store_n(ring->cq_khead, head + n, __ATOMIC_RELEASE);

	/*
	 * What was done above has rung, too, so the bell is reset here, and what
	 * has come in between is looked for: the kernel rings after it has set
	 * the flag, and the eventfd's lock orders that with this.
	 */
	if (read(ring->eventfd, &bells, sizeof(bells)) < 0 && errno != EAGAIN)
		err = -errno;
	*more = n < tail - head ||
		__atomic_load_n(ring->cq_ktail, __ATOMIC_ACQUIRE) != tail ||
		__atomic_load_n(ring->sq_kflags, __ATOMIC_ACQUIRE) &
			(IORING_SQ_TASKRUN | IORING_SQ_CQ_OVERFLOW);
	return n || !err ? (int)n : err;
}

#endif /* KUCOMMS_URING_H */
