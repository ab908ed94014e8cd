/* SPDX-License-Identifier: GPL-2.0-only OR MIT */
/*
 * How two processes meet for a shm:// link: three records of fixed size over a
 * Unix stream socket, each answering the one before, with file descriptors
 * passed along (SCM_RIGHTS).
 *
 *	connecting side				listening side
 *	HELLO   version, ring size wanted   ->
 *					    <-	SETUP   status, ring size agreed on,
 *						        + file of the memory
 *							(+ two eventfds when
 *							KUCOMMS_EVENTFDS)
 *	ATTACH  (+ file of our own pages    ->
 *		when KUCOMMS_SEALED)
 *
 * Without KUCOMMS_SEALED the file holds both sides' pages, the listener's (side
 * 0) first. With it each side brings a file of its own pages, sealed against
 * shrinking, growing and writing by others.
 *
 * After ATTACH each byte on the socket is a doorbell, KUCOMMS_DOORBELL, and
 * nothing else is allowed, but for what KUCOMMS_FEATURE_POOLS adds. End of file means
 * that the peer is gone; whether in order says the state in its producer page.
 *
 * KUCOMMS_FEATURE_POOLS is for processes of the same user. Who connects says in HELLO
 * which features it knows, and SETUP which of those are in force. With it, either side
 * can open pools, whose buffers messages hand over; their files go over the socket,
 * each in one piece with its record, which no doorbell can be taken for: a record
 * begins with the lowest byte of KUCOMMS_MAGIC.
 *
 *	who opens it				the other side
 *	POOL    number, size + file of the  ->
 *		pool, sealed against
 *		shrinking and growing
 *					    <-	MAPPED  number, 0 or an errno
 *
 * A pool is closed by a frame in the ring, KUCOMMS_KIND_POOL: see there.
 *
 * A connecting side that knows KUCOMMS_EVENTFDS says so in HELLO. A listener of
 * the same user that knows it as well answers with it, and passes two eventfds
 * after the memory: the first is rung for the listener, the second for the
 * connecting side, and the socket is for the end of file only. Between users
 * the byte remains: who shares an eventfd can make the other's write() block.
 */
#ifndef _KUCOMMS_RENDEZVOUS_H
#define _KUCOMMS_RENDEZVOUS_H

#include <kucomms/ring.h>

#define KUCOMMS_STEP_HELLO	1
#define KUCOMMS_STEP_SETUP	2
#define KUCOMMS_STEP_ATTACH	3
#define KUCOMMS_STEP_POOL	4
#define KUCOMMS_STEP_MAPPED	5

#define KUCOMMS_SEALED		1	/* flag in SETUP */
#define KUCOMMS_EVENTFDS	2	/* flag in HELLO, then in SETUP */
#define KUCOMMS_RENDEZVOUS_FLAGS	3
#define KUCOMMS_DOORBELL	1

/* Status in SETUP. */
#define KUCOMMS_ACCEPTED	0
#define KUCOMMS_REFUSED_BUSY	1	/* the listener has all the links it takes */
#define KUCOMMS_REFUSED_VERSION	2	/* unknown ABI version or feature */
#define KUCOMMS_REFUSED_MEMORY	3	/* no memory for the rings */
#define KUCOMMS_REFUSED_USER	4	/* the peer's user is not allowed */

/**
 * struct kucomms_rendezvous - one record
 * @magic: KUCOMMS_MAGIC
 * @version: KUCOMMS_ABI_VERSION
 * @step: KUCOMMS_STEP_*
 * @features: feature bits wanted, then agreed on
 * @ring_size: bytes wanted (0: the listener's default), then agreed on; in POOL: bytes
 *	       of the pool
 * @status: in SETUP: KUCOMMS_ACCEPTED or KUCOMMS_REFUSED_*; in MAPPED: 0 or an errno
 * @flags: in HELLO: KUCOMMS_EVENTFDS or 0; in SETUP: that or KUCOMMS_SEALED or 0
 * @hello_length: bytes of @hello in use
 * @pool: in POOL and MAPPED: the number of the pool; else zero
 * @hello: the user's, in HELLO and SETUP
 */
struct kucomms_rendezvous {
	__u64 magic;
	__u32 version;
	__u32 step;
	__u64 features;
	__u64 ring_size;
	__u32 status;
	__u32 flags;
	__u32 hello_length;
	__u32 pool;
	__u8 hello[KUCOMMS_HELLO_MAX];
};

KUCOMMS_STATIC_ASSERT(rendezvous_size, sizeof(struct kucomms_rendezvous) == 112);

#endif /* _KUCOMMS_RENDEZVOUS_H */
