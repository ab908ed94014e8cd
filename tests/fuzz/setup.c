/* SPDX-License-Identifier: GPL-2.0-only OR MIT */
/*
 * Setting up a channel when the system says no: each of its calls fails once, and
 * nothing stays mapped.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

static unsigned int calls, failing;	/* the call that fails; 0: none */
static size_t mapped;			/* bytes */

static int fails(void)
{
	return ++calls == failing;
}

static void *test_mmap(void *at, size_t length, int protection, int flags,
		       int fd, off_t offset)
{
	void *got = fails() ? MAP_FAILED :
			      mmap(at, length, protection, flags, fd, offset);

	if (got == MAP_FAILED)
		errno = ENOMEM;
	else if (!(flags & MAP_FIXED))
		mapped += length;
	return got;
}

static int test_munmap(void *at, size_t length)
{
	mapped -= length;
	return munmap(at, length);
}

static int test_madvise(void *at, size_t length, int advice)
{
	if (!fails())
		return madvise(at, length, advice);
	errno = ENOMEM;
	return -1;
}

static int test_mutex_init(pthread_mutex_t *lock,
			   const pthread_mutexattr_t *attributes)
{
	return fails() ? ENOMEM : pthread_mutex_init(lock, attributes);
}

#define mmap			test_mmap
#define munmap			test_munmap
#define madvise			test_madvise
#define pthread_mutex_init	test_mutex_init
#include <kucomms/channel.h>

#define CHECK(condition)						\
	do {								\
		if (!(condition)) {					\
			fprintf(stderr, "%s:%d: %s: not so: %s\n",	\
				__FILE__, __LINE__, __func__,		\
				#condition);				\
			exit(1);					\
		}							\
	} while (0)

int main(void)
{
	uint64_t size = kucomms_ring_size(1);
	uint64_t side = kucomms_side_size(size);
	struct kucomms_channel a, b;
	unsigned int init_calls;
	int err, fd;

	fd = memfd_create("setup", MFD_CLOEXEC);
	CHECK(fd >= 0 && !ftruncate(fd, (off_t)(2 * side)));
	CHECK(!kucomms_channel_init(&b, 1, size, 0, fd, side));
	init_calls = calls;
	for (failing = 1;; failing++) {
		size_t before = mapped;

		calls = 0;
		err = kucomms_channel_init(&a, 0, size, 0, fd, 0);
		if (err) {
			CHECK(err == -ENOMEM && failing <= init_calls);
			CHECK(mapped == before);
			CHECK(!a.side[0].control && !a.side[0].data);
			continue;
		}
		CHECK(failing > init_calls);
		err = kucomms_channel_attach(&a, fd, side);
		if (err) {
			CHECK(err == -ENOMEM);
			CHECK(!a.side[1].control && !a.side[1].data);
		}
		kucomms_channel_destroy(&a);
		CHECK(mapped == before);
		if (!err)
			break;
	}
	/* As many calls for the peer's side, but for the mutex. */
	CHECK(calls == 2 * init_calls - 1 && failing == calls + 1);
	kucomms_channel_destroy(&b);
	CHECK(!mapped);
	printf("ok %u calls failed\n", calls);
	return 0;
}
