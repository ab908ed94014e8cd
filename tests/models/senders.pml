/* SPDX-License-Identifier: MIT */
/*
 * Several senders ask at once whether to ring. In user space (ring.h,
 * wake_consumer()) a bell too many is rung, never one too few. With KERNEL
 * (channel.c, must_ring()) the doorbell has a level, poll(): it is true while what
 * was rung for is the epoch that is parked in, and must not become false by itself.
 *
 * Here a message is the position and nothing more; frames are in park.pml.
 */
#define MESSAGES	3
#define VALUES		8
#define THREADS		3
#define CONSUMER	1

#define TX_POSITION	0
#define RELEASED	1
#define TX_RUNG		1
#define RX_PARKED	2
#define WORDS		3
#define PLAIN		1

#include "memory.h"

#ifdef KERNEL
#ifdef WITHOUT_MUST_RING_MB
#define senders_mb()	skip
#endif
#elif defined(WITHOUT_WAKE_CONSUMER_MB)
#define senders_mb()	skip
#endif
#ifndef senders_mb
#define senders_mb()	full_barrier()
#endif
#ifdef WITHOUT_PARK_FOR_DATA_MB
#define park_for_data_mb()	skip
#else
#define park_for_data_mb()	full_barrier()
#endif

#define NEWEST(w)	values[w].at[last[w]]

byte tx_position, rx_position, rx_parked;
bit bell;

/* Under the lock; nobody waits for it, since what it protects is one turn. */
inline publish()
{
	yield();
	learn(LOCKS);
	tx_position++;
	store_release(TX_POSITION, tx_position);
	tell(LOCKS)
}

inline ask_and_ring()
{
	senders_mb();
	load(RX_PARKED, seen);
	load(TX_RUNG, rung);
#if defined(KERNEL) && !defined(WITHOUT_CMPXCHG)
	do
	:: seen > rung ->
		yield();
		if
		:: NEWEST(TX_RUNG) == rung ->
			store(TX_RUNG, seen);
			learn(BARRIERS);
			tell(BARRIERS);
			bell = 1;
			break
		:: else -> rung = NEWEST(TX_RUNG)
		fi
	:: else -> break
	od;
#else
	if
	:: seen != rung ->
		yield();	/* several store it: it matters when */
		store(TX_RUNG, seen);
		bell = 1
	:: else
	fi;
#endif
	seen = 0;
	rung = 0
}

inline look()
{
	load_acquire(TX_POSITION, seen);
	assert(seen >= rx_position);
	yes = (seen > rx_position);
	rx_position = seen;
	seen = 0
}

inline sleep()
{
#ifdef KERNEL
	bell = 1;	/* poll() looks once before it sleeps */
	do
	:: bell ->
		bell = 0;
		yield();
		if
		:: NEWEST(TX_RUNG) == rx_parked -> break
		:: else
		fi
	od
#else
	bell -> bell = 0;
	touched()
#endif
}

active proctype often()
{
	THREAD(0);
	byte rung;

	atomic {
		publish();
		ask_and_ring();
		publish();
		ask_and_ring()
	}
}

active proctype consumer()
{
	THREAD(CONSUMER);

	atomic {
		do
		:: rx_position < MESSAGES ->
			look();
			if
			:: yes
			:: else ->
				rx_parked++;
				store(RX_PARKED, rx_parked);
				park_for_data_mb();
				look();
				if
				:: yes
				:: else -> sleep()
				fi
			fi
		:: else -> break
		od
	}
}

active proctype once()
{
	THREAD(2);
	byte rung;

	atomic {
		publish();
		ask_and_ring()
	}
}
