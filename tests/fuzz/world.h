/* SPDX-License-Identifier: GPL-2.0-only OR MIT */
/*
 * What the fuzz targets share: a channel whose other side acts between any two
 * of our accesses to the shared memory.
 *
 * ring.h reaches shared memory by READ_ONCE() and its kin only. Here each of them
 * is followed by a call of interrupt(), in which the target may do what the other
 * side could have done at that moment. So a value that is read twice is seen to
 * differ, and a check that is made too early is seen to be one.
 *
 * An input is a program: a byte that says where the positions begin, then
 * operations of four bytes. The first byte's lower five bits choose the operation;
 * the upper three, when not zero, put it off: it is done between two accesses
 * inside a later call, and they say how many accesses are waited for.
 *
 * The memory is mapped by channel.h itself, between pages that cannot be touched.
 * A target is one C file that includes this one and defines the functions that
 * are declared below as the target's.
 */
#ifndef KUCOMMS_FUZZ_WORLD_H
#define KUCOMMS_FUZZ_WORLD_H

#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include <asm/barrier.h>

static void interrupt(const volatile void *address);

#undef READ_ONCE
#undef WRITE_ONCE
#undef smp_load_acquire
#undef smp_store_release
#undef smp_mb

#define LOAD(p, order)							\
	__extension__({							\
		__auto_type seen_ = __atomic_load_n((p), (order));	\
		interrupt(p);						\
		seen_;							\
	})
#define STORE(p, value, order)						\
	do {								\
		__atomic_store_n((p), (value), (order));		\
		interrupt(p);						\
	} while (0)

#define READ_ONCE(x)		LOAD(&(x), __ATOMIC_RELAXED)
#define WRITE_ONCE(x, value)	STORE(&(x), (value), __ATOMIC_RELAXED)
#define smp_load_acquire(p)	LOAD((p), __ATOMIC_ACQUIRE)
#define smp_store_release(p, v)	STORE((p), (v), __ATOMIC_RELEASE)
#define smp_mb()							\
	do {								\
		__atomic_thread_fence(__ATOMIC_SEQ_CST);		\
		interrupt(NULL);					\
	} while (0)

/* Who spins leaves the processor to the other side. */
#define __builtin_ia32_pause()	interrupt(NULL)

static void *copy(void *to, const void *from, size_t length)
{
	memcpy(to, from, length);
	interrupt(from);
	return to;
}

/* With a page that cannot be touched on either side. */
static void *guarded_mmap(void *at, size_t length, int protection, int flags,
			  int fd, off_t offset)
{
	size_t page = (size_t)sysconf(_SC_PAGESIZE);
	char *room;

	if (at)
		return mmap(at, length, protection, flags, fd, offset);
	room = mmap(NULL, length + 2 * page, PROT_NONE,
		    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (room == MAP_FAILED)
		return room;
	return mmap(room + page, length, protection, flags | MAP_FIXED, fd,
		    offset);
}

#define memcpy	copy
#define mmap	guarded_mmap
#include <kucomms/channel.h>
#undef memcpy
#undef mmap

#define CHECK(condition)						\
	do {								\
		if (!(condition)) {					\
			fprintf(stderr, "%s:%d: %s: not so: %s\n",	\
				__FILE__, __LINE__, __func__,		\
				#condition);				\
			abort();					\
		}							\
	} while (0)

#define RING_SIZE	8192	/* more than KUCOMMS_PUT_MAX */
#define LENGTH_MAX	(RING_SIZE - 32)

static struct kucomms_channel a;	/* side 0; sends */
static struct kucomms_channel b;	/* side 1; receives */
static unsigned char *raw;		/* all pages, writable */
static unsigned char *pattern;		/* LENGTH_MAX + 256 bytes, no more */

/* What side 0 writes as the producer, and what side 1 writes as the consumer */
static struct kucomms_producer *raw_producer;
static struct kucomms_consumer *raw_consumer;
static unsigned char *raw_data;

/* ---- the program ---------------------------------------------------------- */

enum { OPCODES = 32, DELAYED_MAX = 16 };

struct operation {
	uint8_t code;		/* below OPCODES */
	uint8_t delay;		/* accesses to wait for, when put off */
	uint8_t x, y, z;
};

static struct operation delayed[DELAYED_MAX];
static unsigned int delayed_first, delayed_end;
static int inside;		/* an interrupt: it is not interrupted */
static unsigned int accesses;	/* since begin() */
static const volatile void *watched;
static unsigned int watched_loads;

/* Of the target: do it now. @nested: between two accesses of a call. */
static void perform(const struct operation *operation, int nested);
/* Of the target: what has to hold whenever nobody is inside a call. */
static void check_all(void);
/* Of the target: begin and end of a program. */
static void program_begin(uint64_t position);
static void program_end(void);

static void interrupt(const volatile void *address)
{
	struct operation *next;

	if (inside)
		return;
	accesses++;
	if (address && address == watched)
		watched_loads++;
	while (delayed_first != delayed_end) {
		next = &delayed[delayed_first];
		if (next->delay) {
			next->delay--;
			return;
		}
		delayed_first++;
		inside = 1;
		perform(next, 1);
		inside = 0;
	}
}

/* Before a call whose accesses are counted, those of @watch apart. */
static inline void begin(const volatile void *watch)
{
	accesses = 0;
	watched = watch;
	watched_loads = 0;
}

/* Lengths that matter: small ones, all that there are, too long ones. */
static inline uint32_t length_of(const struct operation *operation)
{
	switch (operation->z >> 6) {
	case 0:
		return operation->y;
	case 1:
		return (uint32_t)operation->y * 32 + (operation->z & 31);
	case 2:
		return LENGTH_MAX - operation->y + (operation->z & 15);
	default:
		return operation->z & 1 ? UINT32_MAX - operation->y :
					  RING_SIZE / 4 * (operation->y & 7);
	}
}

/* Numbers that matter, near @now or not. */
static inline uint64_t number_of(const struct operation *operation,
				 uint64_t now)
{
	uint64_t near = (uint64_t)(int16_t)(operation->y | operation->z << 8);

	switch (operation->x >> 5) {
	case 0:
		return near;
	case 1:
		return now + near;
	case 2:
		return now + near * 8;
	case 3:
		return now + RING_SIZE + (uint64_t)(int8_t)operation->y * 8;
	case 4:
		return now - RING_SIZE + (uint64_t)(int8_t)operation->y * 8;
	case 5:
		return (uint64_t)operation->y << (operation->z & 63);
	case 6:
		return now ^ (uint64_t)operation->y << (operation->z & 63);
	default:
		return (uint64_t)operation->y * 0x0101010101010101ULL;
	}
}

static void world_open(void)
{
	static struct kucomms_channel *const channels[] = { &a, &b };
	uint64_t page = kucomms_page_size();
	uint64_t side = kucomms_side_size(RING_SIZE);
	uint32_t i;
	int fd;

	fd = memfd_create("fuzz", MFD_CLOEXEC);
	CHECK(fd >= 0 && !ftruncate(fd, (off_t)(2 * side)));
	raw = mmap(NULL, 2 * side, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	CHECK(raw != MAP_FAILED);
	for (i = 0; i < 2; i++)
		CHECK(!kucomms_channel_init(channels[i], i, RING_SIZE,
					    KUCOMMS_FEATURE_POOLS, fd,
					    i * side));
	for (i = 0; i < 2; i++)
		CHECK(!kucomms_channel_attach(channels[i], fd, !i * side));
	close(fd);
	raw_producer = (struct kucomms_producer *)(raw + page);
	raw_consumer = (struct kucomms_consumer *)(raw + side + 2 * page);
	raw_data = raw + KUCOMMS_CONTROL_PAGES * page;
	pattern = malloc(LENGTH_MAX + 256);
	CHECK(pattern);
	for (i = 0; i < LENGTH_MAX + 256; i++)
		pattern[i] = (unsigned char)((i * 2654435761u) >> 13);
}

/* As it was after world_open(), but for where the positions begin, and the kinds. */
static void world_reset(uint64_t position, int pools)
{
	uint64_t side = kucomms_side_size(RING_SIZE);

	memset(raw_producer, 0, sizeof(*raw_producer));
	memset(raw_consumer, 0, sizeof(*raw_consumer));
	memset(raw_data, 0, RING_SIZE);
	kucomms_geometry_fill((struct kucomms_geometry *)raw, 0, RING_SIZE,
			      KUCOMMS_FEATURE_POOLS);
	kucomms_geometry_fill((struct kucomms_geometry *)(raw + side), 1,
			      RING_SIZE, KUCOMMS_FEATURE_POOLS);
	kucomms_ring_producer_init(&a.tx, a.tx.own, a.tx.peer, a.tx.data,
				   RING_SIZE);
	kucomms_ring_consumer_init(&b.rx, b.rx.own, b.rx.peer, b.rx.data,
				   RING_SIZE);
	if (pools)
		b.rx.kinds |= 1 << KUCOMMS_KIND_BUFFER |
			      1 << KUCOMMS_KIND_POOL;
	a.tx.position = position;
	a.tx.consumed = position;
	b.rx.position = position;
	b.rx.published = position;
	b.rx.available = position;
	raw_producer->position = position;
	raw_consumer->position = position;
	a.messages_sent = a.bytes_sent = a.full_waits = 0;
	a.publishes = a.releases = a.doorbells_rung = a.protocol_errors = 0;
	b.messages_received = b.bytes_received = 0;
	b.publishes = b.releases = b.doorbells_rung = b.protocol_errors = 0;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct operation operation;

	inside = 1;
	if (!raw)
		world_open();
	if (!size)
		return 0;
	delayed_first = 0;
	delayed_end = 0;
	/* At 0, or shortly before the positions overflow; with pools, or not. */
	world_reset(-(uint64_t)*data * 32, !(*data & 1));
	program_begin(a.tx.position);
	inside = 0;
	for (data++, size--; size >= 4; data += 4, size -= 4) {
		operation.code = *data % OPCODES;
		operation.delay = *data / OPCODES;
		operation.x = data[1];
		operation.y = data[2];
		operation.z = data[3];
		if (!operation.delay) {
			perform(&operation, 0);
			check_all();
		} else if (delayed_end < DELAYED_MAX) {
			operation.delay--;
			delayed[delayed_end++] = operation;
		}
	}
	program_end();
	return 0;
}

#endif
