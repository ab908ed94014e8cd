/* SPDX-License-Identifier: (GPL-2.0-only WITH Linux-syscall-note) OR MIT */
/*
 * The ABI of kucomms: what two sides of a channel see in shared memory.
 *
 * A channel has two sides, 0 and 1. Each side owns one run of pages, which it
 * alone writes and the other side only reads:
 *
 *	offset 0	struct kucomms_geometry	(written once, before sharing)
 *	+ 1 page	struct kucomms_producer	(of the ring in which it sends)
 *	+ 2 pages	struct kucomms_consumer	(of the ring in which it receives)
 *	+ 3 pages	data			(of the ring in which it sends)
 *
 * so the two rings of a channel are (side 0's producer and data, side 1's
 * consumer) and the same with the sides exchanged.
 */
#ifndef _UAPI_LINUX_KUCOMMS_H
#define _UAPI_LINUX_KUCOMMS_H

#include <linux/ioctl.h>
#include <linux/types.h>

#define KUCOMMS_MAGIC		0x736d6d6f63756bULL	/* "kucomms", little endian */
#define KUCOMMS_ABI_VERSION	1

/*
 * Feature bits of an ABI version. Who connects says which of them it knows, who
 * listens which of those are in force. An unknown bit is refused.
 *
 * TURNS: one side may send, and passes the turn with its message. Side 1, which
 * connects, begins. A side that sends out of turn breaks the rules.
 *
 * POOLS: messages can hand over buffers. A kernel endpoint has to allow it, and a
 * program of 32 bits never has it: the offsets of its mmap() end at 2^44, which not
 * all pools are below. (Its stores of 64 bits may come in two halves; the other
 * side can take such a position for nonsense, and shut its channel.)
 */
#define KUCOMMS_FEATURE_TURNS	0x1ULL
#define KUCOMMS_FEATURE_POOLS	0x2ULL
#define KUCOMMS_FEATURES	0x3ULL	/* all that are known */

#define KUCOMMS_NAME_MAX	48	/* characters in the NAME of a URL */
#define KUCOMMS_HELLO_MAX	64	/* bytes of the user's hello blob */
#define KUCOMMS_CONTROL_PAGES	3	/* pages of a side before its data */
#define KUCOMMS_FRAME_ALIGN	8

/* Flags of a frame. A bit that is not named here is refused. */
#define KUCOMMS_FLAG_BUSY	0x0001	/* reserved, not committed yet */
#define KUCOMMS_FLAG_DISCARD	0x0002	/* to be skipped by the consumer */
#define KUCOMMS_FLAG_REPLY	0x0004	/* answers the request of the same id */
#define KUCOMMS_FLAG_TOKEN	0x0008	/* the turn alone: no data, no reply */
#define KUCOMMS_FLAG_NOTICE	0x0010	/* of KIND_BUFFER: given back, no message */
#define KUCOMMS_FLAGS		0x001f

/* Kinds of frame. */
#define KUCOMMS_KIND_MESSAGE	0
#define KUCOMMS_KIND_POOL	1	/* a struct kucomms_pool_news, no message */
#define KUCOMMS_KIND_BUFFER	2	/* hands over buffers: struct kucomms_carried */

/* What a side says of itself in its producer page. It never goes back. */
#define KUCOMMS_STATE_OPEN	0
#define KUCOMMS_STATE_CLOSED	1	/* closed in order, all is committed */
#define KUCOMMS_STATE_SHUTDOWN	2	/* as CLOSED: the module goes away */

/**
 * struct kucomms_frame - the header of a message in the ring
 * @control: length in bits 0..31, flags in 32..47, kind in 48..55; in 56..63 the
 *	     number of buffers of KUCOMMS_KIND_BUFFER, else zero. One word, so that
 *	     it is read and written in one access.
 * @type: the user's, no value reserved
 * @id: the user's, no value reserved
 * @user_value: the user's, no value reserved
 *
 * The data follows; the next frame begins at the next multiple of 8 bytes.
 */
struct kucomms_frame {
	__u64 control;
	__u64 type;
	__u64 id;
	__u64 user_value;
};

/**
 * struct kucomms_carried - a buffer that is handed over
 * @pool: its number
 * @page: of the pool, at which it begins
 * @length: bytes, at least 1
 *
 * A frame of KUCOMMS_KIND_BUFFER begins with 1 to 255 of these; the data of the
 * message follows them. From then on the buffers are the receiver's, until it
 * hands them over again. A pool has one owner, who allocates in it: side 0 of
 * those with an even number, side 1 of those with an odd one.
 */
struct kucomms_carried {
	__u32 pool;
	__u32 page;
	__u64 length;
};

#define KUCOMMS_CARRIED_MAX	255
#define KUCOMMS_POOLS_MAX	64	/* of each side, at a time */

/**
 * struct kucomms_pool_news - the sender of this frame has a new pool, or closes one
 * @number: of the pool; each number once in the life of a channel
 * @reserved: zero
 * @size: bytes, a multiple of the page; 0 it is closed
 * @offset: where to mmap() it out of the device's file
 *
 * A pool is closed by this frame, so that what was handed over before it is still
 * received before it; the user closes his by KUCOMMS_IOC_CLOSE_POOL. Only the kernel
 * opens one by it: shm:// does so over the socket, with the pool's file.
 */
struct kucomms_pool_news {
	__u32 number;
	__u32 reserved;
	__u64 size;
	__u64 offset;
};

/**
 * struct kucomms_producer - what the producer of a ring tells its consumer
 * @position: bytes ever reserved; only grows, masked on use
 * @parked: "parked for space" epoch, advanced each time before sleeping
 * @wanted: bytes that the producer sleeps for, 0 when it does not
 * @state: KUCOMMS_STATE_*
 *
 * The words are on lines of their own: position changes with each message,
 * parked only when the producer goes to sleep.
 */
struct kucomms_producer {
	__u64 position;
	__u64 reserved0[15];
	__u64 parked;
	__u64 wanted;
	__u64 reserved1[14];
	__u32 state;
	__u32 reserved2;
};

/**
 * struct kucomms_consumer - what the consumer of a ring tells its producer
 * @position: bytes ever released; only grows, masked on use
 * @parked: "parked for data" epoch, advanced each time before sleeping
 */
struct kucomms_consumer {
	__u64 position;
	__u64 reserved0[15];
	__u64 parked;
	__u64 reserved1;
};

/**
 * struct kucomms_geometry - the first page of a side
 * @magic: KUCOMMS_MAGIC
 * @version: KUCOMMS_ABI_VERSION
 * @side: 0 or 1: whose pages these are
 * @features: feature bits in force
 * @page_size: bytes of a page here
 * @ring_size: bytes of the data area, a power of two, at least a page
 * @producer_offset: of struct kucomms_producer, from the side's start
 * @consumer_offset: of struct kucomms_consumer
 * @data_offset: of the data
 * @frame_size: sizeof(struct kucomms_frame)
 * @reserved: zero
 */
struct kucomms_geometry {
	__u64 magic;
	__u32 version;
	__u32 side;
	__u64 features;
	__u64 page_size;
	__u64 ring_size;
	__u64 producer_offset;
	__u64 consumer_offset;
	__u64 data_offset;
	__u64 frame_size;
	__u64 reserved[7];
};

/*
 * The device, /dev/kucomms_NAME. Each open file that has been set up is one
 * channel to the kernel endpoint of that name. Side 0 is the kernel's, side 1
 * the user's. Both are mapped out of the file, MAP_SHARED: side 1 as the user
 * likes, side 0 only for reading.
 *
 * A channel ends with its last mapping, whoever holds descriptors: a forked
 * child inherits those, but no mappings. One that was never mapped ends with its
 * last descriptor.
 *
 * An endpoint can number its channels: then each is one of so many, and no two
 * files have the same at a time.
 *
 * poll(): before the set-up, POLLIN | POLLOUT when an endpoint is registered,
 * and POLLPRI when it may be worth another try: a channel was announced or
 * became free, or an endpoint came or went, since the last set-up of this file
 * failed with ECHRNG, EADDRINUSE, EBUSY, EDQUOT or EAGAIN (not by what the
 * endpoint's callback said); or, after EINPROGRESS, the endpoint has answered.
 * After it, what follows; an epoll that has watched for the former has to be
 * told anew (EPOLL_CTL_DEL, EPOLL_CTL_ADD).
 *
 *	POLLIN	the kernel has rung for the epoch in which the consumer (the
 *		user) has parked last, see struct kucomms_consumer: there is a
 *		message, or the producer wants something
 *	POLLOUT	the same for the producer's epoch: there is room
 *	POLLHUP	the kernel's end is closed, for good
 *	POLLERR	it was closed because the user broke the rules of the ring
 */
#define KUCOMMS_IOC_MAGIC	0xe7

/* In struct kucomms_setup: the channel has a number. */
#define KUCOMMS_SETUP_NUMBER	0x1

/**
 * struct kucomms_setup - KUCOMMS_IOC_SETUP: make a channel of an open file
 * @version: in: KUCOMMS_ABI_VERSION; out: the module's, also with an error
 * @hello_length: in: bytes of @hello; out: the same of the endpoint's
 * @features: in: all that the user knows; out: those in force
 * @ring_size: in: bytes of each ring, 0 for the endpoint's choice; out: what it
 *	       is, a power of two, at most the endpoint's limit
 * @page_size: out
 * @side_size: out: bytes of each side
 * @side_offset: out: where to mmap() side 0 and side 1
 * @hello: in: the user's greeting; out: the endpoint's
 * @flags: in: KUCOMMS_SETUP_NUMBER for the channel of this number and no other;
 *	   out: the same when the endpoint numbers its channels
 * @channel: the number, or 0; in, without the flag: 0, for the lowest free one
 * @reserved: zero
 *
 * EBADF	   the file is not open for both reading and writing
 * ENOTCONN	   no endpoint is registered (yet)
 * ESHUTDOWN	   it went away while its callback was waited for
 * ECHRNG	   there is no channel of this number (yet)
 * EADDRINUSE	   another file has the channel of this number
 * EDQUOT	   this user has all channels that the endpoint gives one user
 * EBUSY	   no channel is free, or the endpoint has all that it takes
 * EALREADY	   this file has a channel, or another thread is just making it one
 * EPROTONOSUPPORT unknown version or features, or one of the endpoint's that the
 *		   user does not know; then out: @features: what the module knows
 * EINVAL	   nonsense
 * ENOMEM	   no memory, no thread, or too little memory would be left for
 *		   others
 * EAGAIN	   with O_NONBLOCK: a channel that it could be is just being closed;
 *		   poll() tells when it is worth another try
 * EINPROGRESS	   with O_NONBLOCK: the endpoint has not answered yet. The set-up
 *		   goes on. poll() tells when there is an answer, and the next
 *		   KUCOMMS_IOC_SETUP of this file takes it, whatever else that one
 *		   asks for. Closing the file gives the channel up
 * EINTR	   a signal came; the channel is given up, and the next call begins
 *		   anew, as it does by itself after a handler with SA_RESTART
 *
 * or what the endpoint says. Without O_NONBLOCK, both its answer and the end of a
 * channel that is just being closed are waited for.
 *
 * The process that has opened the file stands for the channel, also when another
 * sets it up: its effective user is counted, and the endpoint is told of both.
 */
struct kucomms_setup {
	__u32 version;
	__u32 hello_length;
	__u64 features;
	__u64 ring_size;
	__u64 page_size;
	__u64 side_size;
	__u64 side_offset[2];
	__u8 hello[KUCOMMS_HELLO_MAX];
	__u32 flags;
	__u32 channel;
	__u64 reserved[7];
};

#define KUCOMMS_WAIT_DATA	0x1
#define KUCOMMS_WAIT_SPACE	0x2

/**
 * struct kucomms_wait - KUCOMMS_IOC_WAIT: sleep until the kernel has rung
 * @events: in: KUCOMMS_WAIT_*, not zero; out: those that have come, none when
 *	    another thread has parked again meanwhile
 * @reserved: zero
 * @timeout_ns: in: -1 for ever; out: with EINTR what is left, so that the same
 *		call again waits for the rest. It does so by itself after a
 *		handler with SA_RESTART, or when the machine was suspended
 *
 * To be called after parking for what is waited for. ETIMEDOUT; EAGAIN with
 * O_NONBLOCK, when nothing has come; ESHUTDOWN the kernel's end is closed,
 * EPROTO it was because the user broke the rules; EINTR.
 */
struct kucomms_wait {
	__u32 events;
	__u32 reserved;
	__s64 timeout_ns;
};

/* The pages are physically contiguous: at most as many as the page allocator has. */
#define KUCOMMS_POOL_CONTIGUOUS		0x1
#define KUCOMMS_POOL_CONTIGUOUS_MAX	0x400000ULL	/* bytes */

#define KUCOMMS_POOL_MAX		0x100000000ULL	/* bytes of a pool */

/**
 * struct kucomms_pool_request - KUCOMMS_IOC_OPEN_POOL, KUCOMMS_IOC_CLOSE_POOL
 * @size: open: in: bytes, a multiple of the page; close: 0
 * @flags: open: KUCOMMS_POOL_*; close: 0
 * @number: open: out; close: in
 * @offset: open: out: where to mmap() it; close: 0
 * @reserved: zero
 *
 * A pool that the user allocates in. Its pages are ordinary ones, which can be
 * pinned. They are charged to the caller's memory cgroup, and until they are
 * freed to what its user may lock, RLIMIT_MEMLOCK, unless it has CAP_IPC_LOCK.
 * Closed: what the kernel holds of it stays until it is let go, and so do
 * mappings; all that was sent before is still received. Until nothing is left of
 * it, it counts as one of KUCOMMS_POOLS_MAX, and its bytes among those that the
 * endpoint allows.
 *
 * EBADF	the file is not open for both reading and writing
 * ENOTCONN	before the set-up
 * EOPNOTSUPP	the feature is not in force
 * EINVAL	nonsense, or more than KUCOMMS_POOL_MAX or
 *		KUCOMMS_POOL_CONTIGUOUS_MAX
 * EMFILE	too many pools
 * EDQUOT	more bytes than the endpoint allows the pools of a channel
 * EPERM	more than RLIMIT_MEMLOCK
 * ENOMEM	no memory, or too little would be left for others
 * ENOENT	no such pool of the user's
 * ESHUTDOWN, EPROTO	as KUCOMMS_IOC_WAIT
 *
 * mmap() of a pool: MAP_SHARED, not for execution; all of it or some, any number
 * of times. ENOENT there is no such pool (any more).
 */
struct kucomms_pool_request {
	__u64 size;
	__u32 flags;
	__u32 number;
	__u64 offset;
	__u64 reserved[4];
};

#define KUCOMMS_IOC_SETUP	_IOWR(KUCOMMS_IOC_MAGIC, 0, struct kucomms_setup)
/* Ring the kernel's doorbell. ENOTCONN before the set-up, ESHUTDOWN, EPROTO. */
#define KUCOMMS_IOC_KICK	_IO(KUCOMMS_IOC_MAGIC, 1)
#define KUCOMMS_IOC_WAIT	_IOWR(KUCOMMS_IOC_MAGIC, 2, struct kucomms_wait)
#define KUCOMMS_IOC_OPEN_POOL	_IOWR(KUCOMMS_IOC_MAGIC, 3, struct kucomms_pool_request)
#define KUCOMMS_IOC_CLOSE_POOL	_IOW(KUCOMMS_IOC_MAGIC, 4, struct kucomms_pool_request)

#endif /* _UAPI_LINUX_KUCOMMS_H */
