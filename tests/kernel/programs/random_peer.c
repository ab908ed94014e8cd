// SPDX-License-Identifier: MIT
/*
 * A user of a kucomms device that does anything at all: several threads that
 * share descriptors and mappings do random system calls on them, write into the
 * pages, and fork.
 *
 *	random_peer PATH SECONDS SEED
 *
 * Prints, as JSON, how often what has succeeded; so that a test sees that it
 * gets that far. For that it goes on, where all is slow, until everything that is
 * not rare has; but not for ever. Threads race, so a seed does not repeat a run
 * exactly.
 */
#define _GNU_SOURCE

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/file.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <linux/kucomms.h>

#define PAGE		4096ULL
#define THREADS		3
#define PATIENCE	60	/* seconds for what has to succeed once */
#define SLOTS		6
#define MAPS		12
/* Far from where the C library maps: what is unmapped here is of nobody else. */
#define ARENA		0x1000000000ULL
#define ARENA_PAGES	8192

enum {
	OPEN, CLOSE, SETUP, MAP, UNMAP, REMAP, PROTECT, ADVISE, WRITE, SEND,
	KICK, WAIT, IOCTL, POLL, EPOLL, FORK, MEMORY, OTHER, FAULT, KINDS
};

static const char *const names[KINDS] = {
	"open", "close", "setup", "map", "unmap", "remap", "protect", "advise",
	"write", "send", "kick", "wait", "ioctl", "poll", "epoll", "fork",
	"memory", "other", "fault"
};

/* How often each of them, of the sum. */
static const int weights[KINDS] = {
	6, 2, 8, 12, 2, 1, 1, 2, 24, 48, 16, 6, 3, 4, 3, 1, 3, 4, 0
};

/* What the kernel refuses more often than not. */
static const int rare[KINDS] = {
	[IOCTL] = 1, [REMAP] = 1, [FAULT] = 1, [FORK] = 1, [OTHER] = 1,
	[MEMORY] = 1
};

struct map {
	_Atomic uint64_t at;	/* 0: none */
	_Atomic uint64_t pages;
	_Atomic uint64_t first;	/* page of the device */
	_Atomic uint64_t side;	/* pages of one */
};

static const char *path;
static atomic_int going = 1;
static atomic_int fds[SLOTS];		/* 0: none */
static _Atomic uint64_t sides[SLOTS];	/* pages of a side, 0: not set up */
static struct map maps[MAPS];
static atomic_ulong succeeded[KINDS];

static _Thread_local uint64_t state;
static _Thread_local sigjmp_buf back;
static _Thread_local volatile int may_fault;
static _Thread_local struct map *volatile touched;

static uint64_t draw(void)
{
	state ^= state << 13;
	state ^= state >> 7;
	state ^= state << 17;
	return state * 0x2545f4914f6cdd1dULL >> 8;
}

static uint64_t below(uint64_t limit)
{
	return draw() % limit;
}

static int one_in(uint64_t count)
{
	return !below(count);
}

/* A number that is likely to be just wrong. */
static uint64_t number(uint64_t right)
{
	static const int64_t off[] = { 0, 0, 0, 0, 8, -8, 32, 64, 4, 1, PAGE, -PAGE, 1 << 20 };

	switch (below(8)) {
	case 0:
		return draw() << 40 ^ draw();
	case 1:
		return 1ULL << below(64);
	case 2:
		return -(int64_t)below(3);
	default:
		return right + off[below(sizeof(off) / sizeof(*off))];
	}
}

static void on_fault(int signal)
{
	if (!may_fault)
		_exit(100 + signal);
	siglongjmp(back, 1);
}

static int done(int kind, int result)
{
	if (result >= 0)
		atomic_fetch_add(&succeeded[kind], 1);
	return result;
}

static uint64_t arena(uint64_t pages)
{
	return ARENA + below(ARENA_PAGES - pages) * PAGE;
}

static struct map *any_map(void)
{
	struct map *map = &maps[below(MAPS)];

	return map->at ? map : NULL;
}

/* ---- the device ---------------------------------------------------------- */

static void do_open(int slot)
{
	static const int modes[] = { O_RDWR, O_RDWR, O_RDWR, O_RDWR, O_RDONLY, O_WRONLY };
	int none = 0;
	int fd = open(path, modes[below(6)] | O_CLOEXEC | (one_in(2) ? O_NONBLOCK : 0));

	if (done(OPEN, fd) < 0)
		return;
	sides[slot] = 0;
	if (!atomic_compare_exchange_strong(&fds[slot], &none, fd))
		close(fd);
}

static void do_close(int slot)
{
	int fd = atomic_exchange(&fds[slot], 0);

	if (fd)
		done(CLOSE, close(fd));
}

static void do_setup(int slot, int fd)
{
	struct kucomms_setup setup = { .version = KUCOMMS_ABI_VERSION };

	setup.ring_size = one_in(32) ? number(1 << 24) : PAGE << below(5);
	if (one_in(4)) {
		uint64_t *words = (uint64_t *)&setup;

		do
			words[below(sizeof(setup) / 8)] = number(one_in(2));
		while (one_in(2));
	}
	if (!done(SETUP, ioctl(fd, KUCOMMS_IOC_SETUP, &setup)))
		sides[slot] = setup.side_size / PAGE;
}

static void do_map(int slot, int fd)
{
	uint64_t side = sides[slot], first, pages, at;
	struct map *map = &maps[below(MAPS)];
	int prot = PROT_READ, flags = MAP_SHARED;

	if (!side)
		side = 4;
	first = one_in(2) ? side : 0;
	pages = side;
	if (first)
		prot |= PROT_WRITE;
	if (one_in(3)) {
		first = below(2 * side + 2);
		pages = 1 + below(side + 2);
		prot = below(8);
		flags = below(8) ? MAP_SHARED : MAP_PRIVATE;
	}
	if (one_in(16))
		flags |= MAP_POPULATE;
	if (pages > ARENA_PAGES / 2)
		return;
	at = arena(pages);
	if (mmap((void *)at, pages * PAGE, prot, flags | MAP_FIXED, fd, first * PAGE) == MAP_FAILED)
		return;
	done(MAP, 0);
	map->at = at;
	map->pages = pages;
	map->first = first;
	map->side = side;
}

static void do_wait(int fd)
{
	struct kucomms_wait wait = {
		.events = one_in(8) ? number(3) : 1 + below(3),
		.reserved = one_in(16),
		.timeout_ns = one_in(16) ? -2 : below(300000),
	};
	int result = ioctl(fd, KUCOMMS_IOC_WAIT, &wait);

	/* To have waited in vain is to have waited. */
	done(WAIT, result < 0 && errno != ETIMEDOUT ? -1 : 0);
}

static void do_ioctl(int fd)
{
	static unsigned char memory[1 << 14];
	unsigned long command = one_in(2) ? draw() : _IOC(below(4), KUCOMMS_IOC_MAGIC, below(8),
							  below(1 << 14));
	static const unsigned long known[] = {
		KUCOMMS_IOC_SETUP, KUCOMMS_IOC_KICK, KUCOMMS_IOC_WAIT
	};

	/* Known ones with a bad pointer; all else, as a terminal knows it, with a good one. */
	if (one_in(2))
		done(IOCTL, ioctl(fd, known[below(2)], one_in(2) ? arena(1) : draw() << 40));
	else if (command != KUCOMMS_IOC_WAIT)
		done(IOCTL, ioctl(fd, command, memory));
}

static void do_poll(int fd)
{
	struct pollfd ready[2] = {
		{ .fd = fd, .events = below(64) },
		{ .fd = fds[below(SLOTS)], .events = POLLIN },
	};

	done(POLL, poll(ready, 2, below(2)));
}

static void do_epoll(int fd)
{
	struct epoll_event event = { .events = EPOLLIN | (one_in(2) ? EPOLLET : EPOLLOUT) };
	int epoll = epoll_create1(EPOLL_CLOEXEC);

	if (!epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event))
		done(EPOLL, epoll_wait(epoll, &event, 1, below(2)));
	close(epoll);
}

static void do_other(int fd)
{
	char memory[64];
	int result;

	switch (below(10)) {
	case 0:
		result = read(fd, memory, sizeof(memory));
		break;
	case 1:
		result = write(fd, memory, sizeof(memory));
		break;
	case 2:
		result = lseek(fd, draw(), below(5));
		break;
	case 3:
		result = ftruncate(fd, below(1 << 20));
		break;
	case 4:
		result = fcntl(fd, F_SETFL, below(4) ? O_NONBLOCK : O_NONBLOCK | O_ASYNC);
		break;
	case 5:
		result = flock(fd, LOCK_NB | (one_in(2) ? LOCK_EX : LOCK_UN));
		break;
	case 6:
		result = fsync(fd);
		break;
	case 7:
		result = dup(fd);
		if (result >= 0)
			close(result);
		break;
	case 8:
		result = fallocate(fd, 0, 0, PAGE);
		break;
	default:
		result = posix_fadvise(fd, 0, PAGE, below(6));
	}
	done(OTHER, result);
}

/* ---- its memory ---------------------------------------------------------- */

static void do_advise(uint64_t at, uint64_t pages)
{
	/* Not: remove, hwpoison, soft_offline. */
	static const int advice[] = {
		0, 1, 2, 3, MADV_DONTNEED, 8, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22,
		23, 25, 77
	};

	done(ADVISE, madvise((void *)at, pages * PAGE, advice[below(sizeof(advice) / 4)]));
}

static void do_remap(uint64_t at, uint64_t pages)
{
	uint64_t size = one_in(3) ? below(4) * PAGE : pages * PAGE;
	uint64_t wanted = one_in(2) ? size : (1 + below(2 * pages)) * PAGE;
	void *moved;

	moved = mremap((void *)at, size, wanted, MREMAP_MAYMOVE | MREMAP_FIXED,
		       arena(wanted / PAGE));
	if (moved != MAP_FAILED)
		done(REMAP, 0);
}

static void do_write(struct map *map)
{
	uint64_t words = map->pages * PAGE / 8;
	volatile uint64_t *at = (volatile uint64_t *)map->at;
	uint64_t where = below(words);

	/* The kernel's side: that faults. */
	if (map->first < map->side && below(16))
		return;
	/* The words that count, more often than the others. */
	if (below(4) && map->first == map->side)
		where = (const uint64_t[]){ 512, 528, 529, 544, 1024, 1040 }[below(6)];
	if (at && where < words) {
		at[where] = number(at[where]);
		done(WRITE, 0);
	}
}

/* As a good user does, if its memory is where it was. */
static void do_send(struct map *map)
{
	uint64_t size = (map->side - 3) * PAGE, span = 32 + 8 * below(16), position;
	unsigned char *own = (unsigned char *)map->at;
	volatile uint64_t *frame;

	if (!own || map->first != map->side || map->pages != map->side || map->side < 4 ||
	    size & (size - 1))
		return;
	position = *(volatile uint64_t *)(own + PAGE);
	if ((position & (size - 1)) + span > size)
		return do_write(map);
	frame = (volatile uint64_t *)(own + 3 * PAGE + (position & (size - 1)));
	frame[0] = span - 32;
	if (one_in(8))
		frame[0] = number(frame[0]);
	frame[1] = 0;
	frame[2] = draw();
	atomic_thread_fence(memory_order_release);
	*(volatile uint64_t *)(own + PAGE) = position + span;
	/* and read all, wherever that is */
	*(volatile uint64_t *)(own + 2 * PAGE) += one_in(4) ? span : 0;
	done(SEND, 0);
}

/* By way of the kernel's own copies. */
static void do_memory(uint64_t at, uint64_t pages)
{
	uint64_t from[8] = { draw() }, where = at + below(pages * PAGE / 8) * 8;
	struct iovec ours = { from, sizeof(from) }, its = { (void *)where, sizeof(from) };
	unsigned char present[64];

	switch (below(6)) {
	case 0:
		done(MEMORY, process_vm_writev(getpid(), &ours, 1, &its, 1, 0));
		break;
	case 1:
		done(MEMORY, process_vm_readv(getpid(), &ours, 1, &its, 1, 0));
		break;
	case 2:
		done(MEMORY, msync((void *)at, pages * PAGE, MS_SYNC));
		break;
	case 3:
		done(MEMORY, mlock((void *)at, pages * PAGE));
		break;
	case 4:
		done(MEMORY, munlock((void *)at, pages * PAGE));
		break;
	default:
		done(MEMORY, mincore((void *)at, (pages < 64 ? pages : 64) * PAGE, present));
	}
}

/* ---- all of it ----------------------------------------------------------- */

static void do_fork(void);

static void step(void)
{
	int slot = below(SLOTS), fd = fds[slot], kind = 0, pick, sum = 0;
	struct map *map = any_map();
	uint64_t at = arena(64), pages = 1 + below(64);

	for (kind = 0; kind < KINDS; kind++)
		sum += weights[kind];
	pick = below(sum);
	for (kind = 0; pick >= weights[kind]; kind++)
		pick -= weights[kind];
	if (map && below(4)) {
		at = map->at;
		pages = map->pages;
		if (one_in(3)) {
			at += below(pages) * PAGE;
			pages = 1 + below(pages);
		}
	}
	if (!at || !pages)
		return;
	touched = map;
	may_fault = 1;
	if (sigsetjmp(back, 1)) {
		may_fault = 0;
		/* It is no more what it was. */
		if (touched)
			touched->at = 0;
		done(FAULT, 0);
		return;
	}
	if (kind == OPEN || !fd)
		do_open(slot);
	else if (kind == CLOSE)
		do_close(slot);
	else if (kind == SETUP)
		do_setup(slot, fd);
	else if (kind == MAP)
		do_map(slot, fd);
	else if (kind == UNMAP)
		done(UNMAP, munmap((void *)at, pages * PAGE));
	else if (kind == REMAP)
		do_remap(at, pages);
	else if (kind == PROTECT)
		done(PROTECT, mprotect((void *)at, pages * PAGE, below(8)));
	else if (kind == ADVISE)
		do_advise(at, pages);
	else if (kind == WRITE && map)
		do_write(map);
	else if (kind == SEND && map)
		do_send(map);
	else if (kind == KICK)
		done(KICK, ioctl(fd, KUCOMMS_IOC_KICK));
	else if (kind == WAIT)
		do_wait(fd);
	else if (kind == IOCTL)
		do_ioctl(fd);
	else if (kind == POLL)
		do_poll(fd);
	else if (kind == EPOLL)
		do_epoll(fd);
	else if (kind == FORK && one_in(4))
		do_fork();
	else if (kind == MEMORY)
		do_memory(at, pages);
	else if (kind == OTHER)
		do_other(fd);
	may_fault = 0;
}

/* A child has the descriptors, and not the mappings. Some of them are killed. */
static void do_fork(void)
{
	pid_t child = fork();
	int i;

	if (!child) {
		state ^= getpid();
		for (i = 0; i < 50; i++)
			step();
		_exit(0);
	}
	if (child < 0)
		return;
	if (one_in(2))
		kill(child, SIGKILL);
	while (waitpid(child, &i, 0) < 0 && errno == EINTR)
		;
	/* 100 and above: on_fault() */
	if (WIFEXITED(i) && WEXITSTATUS(i))
		_exit(WEXITSTATUS(i));
	done(FORK, 0);
}

static int all_succeeded(void)
{
	int i;

	for (i = 0; i < KINDS; i++)
		if (!rare[i] && !atomic_load(&succeeded[i]))
			return 0;
	return 1;
}

static void *run(void *seed)
{
	state = (uintptr_t)seed;
	while (atomic_load_explicit(&going, memory_order_relaxed))
		step();
	return NULL;
}

int main(int argc, char **argv)
{
	struct sigaction action = { .sa_handler = on_fault, .sa_flags = SA_NODEFER };
	const struct timespec second = { .tv_sec = 1 };
	pthread_t threads[THREADS];
	uint64_t seed;
	int i, seconds;

	if (argc != 4)
		return 2;
	path = argv[1];
	seconds = atoi(argv[2]);
	seed = strtoull(argv[3], NULL, 0) * 2 * THREADS + 1;
	sigaction(SIGSEGV, &action, NULL);
	sigaction(SIGBUS, &action, NULL);
	signal(SIGIO, SIG_IGN);
	for (i = 0; i < THREADS; i++)
		if (pthread_create(&threads[i], NULL, run, (void *)(uintptr_t)(seed + 2 * i)))
			return 3;
	for (i = 0; i < seconds || (i < seconds + PATIENCE && !all_succeeded()); i++)
		while (clock_nanosleep(CLOCK_MONOTONIC, 0, &second, NULL) == EINTR)
			;
	atomic_store(&going, 0);
	for (i = 0; i < THREADS; i++)
		pthread_join(threads[i], NULL);
	for (i = 0; i < KINDS; i++)
		printf("%s\"%s\": %lu", i ? ", " : "{", names[i], succeeded[i]);
	printf("}\n");
	/* Some of it is still open and mapped: that is the kernel's to end. */
	return 0;
}
