// SPDX-License-Identifier: GPL-2.0-only OR MIT
/* The BPF rings, both in place. */

#include <bpf/bpf.h>
#include <bpf/libbpf.h>
#include <errno.h>
#include <sys/ioctl.h>

#include "user.h"

static struct ring_buffer *from_kernel;
static struct user_ring_buffer *to_kernel;
static int map;
static uint64_t expected;

static int receive_one(void *context, void *data, size_t size)
{
	(void)context;
	if (size != KBENCH_SIZE || !good(data, expected))
		return -EBADMSG;
	expected++;
	return 0;
}

static int bpf_open(void)
{
	int to_user = run.start.direction == KBENCH_TO_USER;
	struct bpf_object *object;

	object = bpf_object__open_file(run.bpf, NULL);
	if (!object || bpf_object__load(object))
		return -errno;
	run.start.fd = bpf_program__fd(bpf_object__find_program_by_name(object, to_user ?
									 "send" : "receive"));
	map = bpf_object__find_map_fd_by_name(object, to_user ? "to_user" : "to_kernel");
	if (run.start.fd < 0 || map < 0)
		return -ENOENT;
	if (to_user)
		from_kernel = ring_buffer__new(map, receive_one, NULL, NULL);
	else
		to_kernel = user_ring_buffer__new(map, NULL);
	return from_kernel || to_kernel ? 0 : -errno;
}

/* A program runs only when it is called: that is the doorbell. */
static int bpf_send(uint64_t first, uint32_t count)
{
	uint64_t number, *words;

	for (number = first; number < first + count; number++) {
		words = user_ring_buffer__reserve(to_kernel, KBENCH_SIZE);
		if (!words)
			return -errno;
		fill(words, number);
		user_ring_buffer__submit(to_kernel, words);
	}
	return ioctl(run.control, KBENCH_IOC_KICK) ? -errno : 0;
}

static int bpf_wait(uint64_t first)
{
	(void)first;
	return wait_readable(map);
}

static int bpf_receive(uint64_t first, uint32_t count)
{
	int err;

	expected = first;
	err = ring_buffer__consume(from_kernel);
	if (err < 0)
		return err;
	return expected == first + count ? 0 : -EBADMSG;
}

const struct mechanism bpf = {
	.name = "bpf",
	.number = KBENCH_M_BPF,
	.open = bpf_open,
	.send = bpf_send,
	.wait = bpf_wait,
	.receive = bpf_receive,
};
