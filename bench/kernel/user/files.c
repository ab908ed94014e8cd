// SPDX-License-Identifier: GPL-2.0-only OR MIT
/* What is read, written or mapped: the character device, the mmap device, relay, a pipe. */
#define _GNU_SOURCE

#include <errno.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include "user.h"

#define RELAY_READ	64		/* messages: a sub-buffer */
#define PIPE_BYTES	(1 << 20)

static int file;

static int open_file(const char *path)
{
	file = open(path, O_RDWR | O_CLOEXEC);
	return file < 0 ? -errno : 0;
}

static int wait_file(uint64_t first)
{
	(void)first;
	return wait_readable(file);
}

static int write_all(uint64_t first, uint32_t count)
{
	uint64_t number;

	for (number = first; number < first + count; number++) {
		fill(buffer, number);
		if (write(file, buffer, KBENCH_SIZE) != KBENCH_SIZE)
			return -errno;
	}
	return 0;
}

static int read_all(uint64_t first, uint32_t count)
{
	uint64_t number;

	for (number = first; number < first + count; number++) {
		if (read(file, buffer, KBENCH_SIZE) != KBENCH_SIZE)
			return -errno;
		if (!good(buffer, number))
			return -EBADMSG;
	}
	return 0;
}

/* ---- the character device ---------------------------------------------------------- */

static int chardev_open(void)
{
	return open_file("/dev/" KBENCH_QUEUE);
}

const struct mechanism chardev = {
	.name = "chardev",
	.number = KBENCH_M_CHARDEV,
	.open = chardev_open,
	.send = write_all,
	.wait = wait_file,
	.receive = read_all,
};

/* ---- a pipe -------------------------------------------------------------------------- */

static int pipe_open(void)
{
	int to_user = run.start.direction == KBENCH_TO_USER;
	int ends[2];

	if (pipe2(ends, O_CLOEXEC) || fcntl(ends[0], F_SETPIPE_SZ, PIPE_BYTES) < 0)
		return -errno;
	file = ends[!to_user];
	run.start.fd = ends[to_user];
	return 0;
}

const struct mechanism pipes = {
	.name = "pipe",
	.number = KBENCH_M_PIPE,
	.open = pipe_open,
	.send = write_all,
	.wait = wait_file,
	.receive = read_all,
};

/* ---- the mmap device ------------------------------------------------------------------ */

static struct kbench_slot *slots;

static int shared_open(void)
{
	int err = open_file("/dev/" KBENCH_SHARED);
	void *at;

	if (err)
		return err;
	at = mmap(NULL, KBENCH_SHARED_SIZE, PROT_READ | PROT_WRITE,
		  MAP_SHARED | MAP_POPULATE, file, 0);
	if (at == MAP_FAILED)
		return -errno;
	slots = at;
	return 0;
}

static int shared_send(uint64_t first, uint32_t count)
{
	struct kbench_slot *slot;
	uint64_t number;

	for (number = first; number < first + count; number++) {
		slot = &slots[number % KBENCH_SLOTS];
		if (__atomic_load_n(&slot->flag, __ATOMIC_ACQUIRE))
			return -ENOBUFS;
		fill((uint64_t *)slot->words, number);
		__atomic_store_n(&slot->flag, number + 1, __ATOMIC_RELEASE);
	}
	return 0;
}

static int shared_wait(uint64_t first)
{
	const struct kbench_slot *slot = &slots[KBENCH_SLOTS + first % KBENCH_SLOTS];

	while (!__atomic_load_n(&slot->flag, __ATOMIC_RELAXED))
		;
	return 0;
}

static int shared_receive(uint64_t first, uint32_t count)
{
	struct kbench_slot *slot;
	uint64_t number;

	for (number = first; number < first + count; number++) {
		slot = &slots[KBENCH_SLOTS + number % KBENCH_SLOTS];
		if (__atomic_load_n(&slot->flag, __ATOMIC_ACQUIRE) != number + 1 ||
		    !good((const uint64_t *)slot->words, number))
			return -EBADMSG;
		__atomic_store_n(&slot->flag, 0, __ATOMIC_RELEASE);
	}
	return 0;
}

const struct mechanism shared = {
	.name = "mmap",
	.number = KBENCH_M_MMAP,
	.open = shared_open,
	.send = shared_send,
	.wait = shared_wait,
	.receive = shared_receive,
};

/* ---- relay ------------------------------------------------------------------------------ */

static uint64_t relayed[RELAY_READ * KBENCH_WORDS];

static int relay_open(void)
{
	file = open("/sys/kernel/debug/" KBENCH_RELAY, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
	return file < 0 ? -errno : 0;
}

/* As much as there is, a sub-buffer at most: that is what relay is made for. */
static int relay_receive(uint64_t first, uint32_t count)
{
	uint64_t number = first;
	ssize_t got, at;

	while (number < first + count) {
		got = read(file, relayed, sizeof(relayed));
		if (got <= 0 || got % KBENCH_SIZE)
			return got < 0 ? -errno : -EIO;
		for (at = 0; at < got / 8; at += KBENCH_WORDS)
			if (!good(relayed + at, number++))
				return -EBADMSG;
	}
	return 0;
}

const struct mechanism relay = {
	.name = "relay",
	.number = KBENCH_M_RELAY,
	.open = relay_open,
	.wait = wait_file,
	.receive = relay_receive,
};
