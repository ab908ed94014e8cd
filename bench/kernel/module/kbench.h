/* SPDX-License-Identifier: GPL-2.0-only OR MIT */
/*
 * What both sides of the kernel bench share: the control device, and the
 * contents of a message.
 */
#ifndef _KBENCH_H
#define _KBENCH_H

#include <linux/ioctl.h>
#include <linux/types.h>

#define KBENCH_SIZE		1024		/* bytes of a message */
#define KBENCH_WORDS		(KBENCH_SIZE / 8)
#define KBENCH_SLOTS		256		/* messages of the largest burst */
#define KBENCH_WINDOW		512		/* kept to be sent again */
#define KBENCH_ACK_EVERY	64		/* messages between two acks */

/* The control device is /dev/KBENCH_CONTROL. */
#define KBENCH_CONTROL		"kbench"
#define KBENCH_QUEUE		"kbench_queue"
#define KBENCH_SHARED		"kbench_shared"
#define KBENCH_RELAY		"kbench/relay0"	/* in debugfs */
#define KBENCH_ENDPOINT		"kucomms_kbench"
#define KBENCH_IN_PLACE		"kucomms_kbench_in_place"
#define KBENCH_FAMILY		"kbench"
#define KBENCH_NETLINK		31		/* protocol */
#define KBENCH_NETLINK_RESYNC	30

/* Types of netlink messages. */
#define KBENCH_NL_DATA		0x10
#define KBENCH_NL_ACK		0x11		/* all before nlmsg_seq has come */
#define KBENCH_NL_NAK		0x12		/* send again from nlmsg_seq on */

#define KBENCH_GENL_DATA	1		/* command */
#define KBENCH_GENL_BYTES	1		/* attribute */

enum {
	KBENCH_M_NETLINK,
	KBENCH_M_NETLINK_RESYNC,
	KBENCH_M_GENETLINK,
	KBENCH_M_CHARDEV,
	KBENCH_M_MMAP,
	KBENCH_M_RELAY,
	KBENCH_M_PIPE,
	KBENCH_M_BPF,
	KBENCH_M_KUCOMMS,
	KBENCH_M_KUCOMMS_IN_PLACE,
	KBENCH_M_KUCOMMS_COPIED,
	KBENCH_MECHANISMS,
};

#define KBENCH_TO_KERNEL	0
#define KBENCH_TO_USER		1

/**
 * struct kbench_start - KBENCH_IOC_START: begin a run
 * @mechanism: KBENCH_M_*
 * @direction: KBENCH_TO_KERNEL or KBENCH_TO_USER
 * @full: write and check every byte, not the stamps alone
 * @fd: of a pipe or a BPF program; -1
 * @port: of a netlink socket; 0
 * @lose: as if one of so many messages had been lost; 0 for none
 */
struct kbench_start {
	__u32 mechanism;
	__u32 direction;
	__u32 full;
	__s32 fd;
	__u32 port;
	__u32 lose;
};

/**
 * struct kbench_burst - KBENCH_IOC_ARM and KBENCH_IOC_FINISH
 * @first: ARM: number of the first message
 * @cycles: FINISH: what the kernel's side took
 * @count: ARM: messages
 * @timed: FINISH: messages that @cycles is for
 * @inside: FINISH: @cycles are a part of the sender's own, which waited for them
 * @reserved: zero
 */
struct kbench_burst {
	__u64 first;
	__u64 cycles;
	__u32 count;
	__u32 timed;
	__u32 inside;
	__u32 reserved;
};

#define KBENCH_IOC_START	_IOW('k', 0, struct kbench_start)
/* To the kernel: its side waits for the burst when this returns. To the user:
 * the burst begins when the caller sleeps.
 */
#define KBENCH_IOC_ARM		_IOW('k', 1, struct kbench_burst)
/* The doorbell of a mechanism that has none of its own. */
#define KBENCH_IOC_KICK		_IO('k', 2)
/* To the kernel: all is sent, receive it. Waits for the end of the kernel's part. */
#define KBENCH_IOC_FINISH	_IOR('k', 3, struct kbench_burst)

/* One slot of the mmap device; the flag is on a line of its own. */
struct kbench_slot {
	__u64 words[KBENCH_WORDS];
	__u64 flag;			/* 1 + the message's number, or 0: free */
	__u64 reserved[7];
};

/* One after the other in the mapping: to the kernel, to the user. */
#define KBENCH_SHARED_SIZE	(2 * KBENCH_SLOTS * sizeof(struct kbench_slot))

static inline __u64 kbench_word(__u64 number, unsigned int i)
{
	return (number + 1) * 0x9e3779b97f4a7c15ULL + i * 0xbf58476d1ce4e5b9ULL;
}

/* The stamps, and with @full the rest. */
static inline void kbench_fill(__u64 *words, __u64 number, int full)
{
	unsigned int i;

	if (full)
		for (i = 1; i < KBENCH_WORDS - 1; i++)
			words[i] = kbench_word(number, i);
	words[0] = number;
	words[KBENCH_WORDS - 1] = ~number;
}

/* Return: whether it is message @number. */
static inline int kbench_good(const __u64 *words, __u64 number, int full)
{
	unsigned int i;

	if (words[0] != number || words[KBENCH_WORDS - 1] != ~number)
		return 0;
	if (full)
		for (i = 1; i < KBENCH_WORDS - 1; i++)
			if (words[i] != kbench_word(number, i))
				return 0;
	return 1;
}

#endif /* _KBENCH_H */
