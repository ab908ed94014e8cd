// SPDX-License-Identifier: GPL-2.0-only
/* Both BPF rings: programs that send a burst to the user, and receive one. */

#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>

#include "kbench.h"

#define RING_BYTES	(512 * 1024)

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, RING_BYTES);
} to_user SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_USER_RINGBUF);
	__uint(max_entries, RING_BYTES);
} to_kernel SEC(".maps");

struct burst {
	__u64 number;
	__u64 full;
	__u32 done;
};

static long send_one(__u32 index, void *data)
{
	struct burst *burst = data;
	__u64 *words;

	words = bpf_ringbuf_reserve(&to_user, KBENCH_SIZE, 0);
	if (!words)
		return 1;
	kbench_fill(words, burst->number, !!burst->full);
	bpf_ringbuf_submit(words, 0);
	burst->number++;
	burst->done++;
	return 0;
}

SEC("raw_tp")
int send(struct bpf_raw_tracepoint_args *arguments)
{
	struct burst burst = {
		.number = arguments->args[0],
		.full = arguments->args[2],
	};

	bpf_loop((__u32)arguments->args[1], send_one, &burst, 0);
	return burst.done;
}

static long receive_one(struct bpf_dynptr *record, void *data)
{
	struct burst *burst = data;
	const __u64 *words;

	words = bpf_dynptr_data(record, 0, KBENCH_SIZE);
	if (!words || !kbench_good(words, burst->number, !!burst->full))
		return 1;
	burst->number++;
	burst->done++;
	return 0;
}

SEC("raw_tp")
int receive(struct bpf_raw_tracepoint_args *arguments)
{
	struct burst burst = {
		.number = arguments->args[0],
		.full = arguments->args[2],
	};

	bpf_user_ringbuf_drain(&to_kernel, receive_one, &burst, 0);
	return burst.done;
}

char _license[] SEC("license") = "GPL";
