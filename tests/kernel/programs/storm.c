// SPDX-License-Identifier: MIT
/*
 * One thread is a good user, another one rewrites what is shared, all the time.
 *
 *	storm PATH WHAT SECONDS SEED [TYPE]
 *
 * WHAT is a letter, see change(); TYPE is that of its messages, then long ones.
 * Prints, as JSON, how many channels it had, how many of them the kernel has broken
 * and how many shut, and the bytes that were read of it.
 */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>
#include <linux/kucomms.h>

#define RING 4096ULL
#define SIDE (3 * 4096 + RING)
#define WORD(at) (*(volatile uint64_t *)(at))

static const char *mode;
static unsigned char *own;
static const unsigned char *kernel;
static atomic_int going;
static uint64_t span = 64, seed;

static uint64_t draw(uint64_t *state)
{
	*state ^= *state << 13;
	*state ^= *state >> 7;
	*state ^= *state << 17;
	return *state;
}

/* A position, a length or an epoch that is almost right. */
static uint64_t nearly(uint64_t *state, uint64_t right)
{
	static const int64_t off[] = { 0, 0, 0, 8, -8, 64, -64, 4, 1, 4096, -4096, 1 << 20 };
	uint64_t pick = draw(state) % 16;

	if (pick < 12)
		return right + off[pick];
	if (pick == 12)
		return 0;
	if (pick == 13)
		return 1ULL << 63;
	return draw(state);
}

static void change(uint64_t *state, int what)
{
	static const uint32_t lengths[] = { 0, 31, 33, 40, 96, 4064, 4065, 1U << 31, ~0U, -32U };
	unsigned char *slot = own + 3 * 4096 + draw(state) % (RING / span) * span;
	uint64_t pick = draw(state);

	switch (what) {
	case 'd':	/* data */
		WORD(slot + 32 + draw(state) % (span / 8 - 4) * 8) = pick;
		break;
	case 't':	/* type, id, value */
		WORD(slot + 16 + pick % 2 * 8) = draw(state);
		break;
	case 'l':	/* lengths */
		WORD(slot) = pick % 2 ? span - 32 : lengths[pick / 2 % 10];
		break;
	case 'f':	/* flags, kinds */
		WORD(slot) = (span - 32) | (pick % 4 ? 1ULL << (32 + pick / 4 % 32) : 0);
		break;
	case 'p':	/* the producer's position */
		WORD(own + 4096) = nearly(state, WORD(own + 4096));
		break;
	case 'c':	/* the consumer's position */
		WORD(own + 2 * 4096) = nearly(state, WORD(kernel + 4096));
		break;
	case 'e':	/* epochs and wishes: no breach */
		WORD(own + 4096 + 128 + pick % 2 * 8) = nearly(state, 1);
		WORD(own + 2 * 4096 + 128) = nearly(state, 1);
		break;
	case 's':	/* the state */
		*(volatile uint32_t *)(own + 4096 + 256) = pick % 2 ? 0 : pick / 2 % 4;
		break;
	default:	/* anything, anywhere */
		WORD(own + pick % (SIDE / 8) * 8) = nearly(state, pick >> 32);
	}
}

static void *rewrite(void *unused)
{
	static const char all[] = "dtlfpcesr";
	uint64_t state = seed;
	int i;

	while (atomic_load_explicit(&going, memory_order_relaxed))
		for (i = 0; i < 64; i++)
			change(&state, *mode == 'a' ? all[draw(&state) % 9] : *mode);
	return NULL;
}

static double now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec + t.tv_nsec / 1e9;
}

/* How the channel ended, 0 if it did not. */
static int use(const char *path, double until, uint64_t type, uint64_t *bytes)
{
	struct kucomms_setup setup = { .version = 1, .ring_size = RING };
	struct kucomms_wait wait = { .events = 3 };
	uint64_t position = 0, count = 0;
	struct pollfd ready = { .events = POLLIN };
	pthread_t thread;
	int end = 0;
	int fd = open(path, O_RDWR | O_CLOEXEC);

	if (fd < 0 || ioctl(fd, KUCOMMS_IOC_SETUP, &setup) < 0)
		exit(2);
	kernel = mmap(NULL, SIDE, PROT_READ, MAP_SHARED, fd, 0);
	own = mmap(NULL, SIDE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, SIDE);
	if (kernel == MAP_FAILED || own == MAP_FAILED)
		exit(3);
	atomic_store(&going, 1);
	if (pthread_create(&thread, NULL, rewrite, NULL))
		exit(4);
	while (!end && now() < until) {
		if (position - WORD(kernel + 2 * 4096) <= RING - span) {
			unsigned char *slot = own + 3 * 4096 + position % RING;

			WORD(slot) = span - 32;
			WORD(slot + 8) = type;
			WORD(slot + 24) = 300;
			position += span;
			atomic_thread_fence(memory_order_release);
			WORD(own + 4096) = position;
		}
		WORD(own + 2 * 4096) = WORD(kernel + 4096);
		if (ioctl(fd, KUCOMMS_IOC_KICK) < 0)
			end = errno;
		if (++count % 16 == 0) {
			ready.fd = fd;
			poll(&ready, 1, 0);
			wait.events = 3;
			wait.timeout_ns = count % 3;
			ioctl(fd, KUCOMMS_IOC_WAIT, &wait);
		}
	}
	*bytes += WORD(kernel + 2 * 4096);
	/* Not always after the writer: the memory may go while it is written. */
	if (count % 2)
		close(fd);
	atomic_store(&going, 0);
	pthread_join(thread, NULL);
	if (count % 2 == 0)
		close(fd);
	munmap(own, SIDE);
	munmap((void *)kernel, SIDE);
	return end;
}

int main(int argc, char **argv)
{
	double until = now() + atof(argv[3]);
	int channels = 0, broken = 0, shut = 0;
	uint64_t bytes = 0;

	mode = argv[2];
	seed = strtoull(argv[4], NULL, 0) * 2 + 1;
	if (argc > 5)
		span = 1024;
	do {
		int end = use(argv[1], until, argc > 5 ? strtoull(argv[5], NULL, 0) : 0, &bytes);

		channels++;
		broken += end == EPROTO;
		shut += end == ESHUTDOWN;
		if (end && end != EPROTO && end != ESHUTDOWN)
			return 5;
		seed += 2;
	} while (now() < until);
	printf("[%d, %d, %d, %llu]\n", channels, broken, shut, (unsigned long long)bytes);
	return 0;
}
