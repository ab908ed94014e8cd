/* SPDX-License-Identifier: MIT */
/*
 * The rule of space, against a consumer that lies: a frame that one sender has held
 * and not committed is not given to another one, whatever the consumer's position
 * says; and one that was committed is, without a race with who has written it.
 *
 * The ring has room for one frame. The consumer reads nothing, and says at any time
 * that it has read all.
 */
#define TRIES		3
#define VALUES		4
#define THREADS		3
#define LIAR		1

#define RX_POSITION	0
#define CONTROL		1
#define RELEASED	2
#define WORDS		2
#define PLAIN		1

#include "memory.h"

#define BUSY		1
#define MESSAGE		2

#ifdef WITHOUT_FINISH_RELEASE
#define finish_store	store
#else
#define finish_store	store_release
#endif
#ifdef WITHOUT_FORGET_ACQUIRE
#define forget_load	load
#else
#define forget_load	load_acquire
#endif

/* Under the senders' lock. */
byte tx_position;
bit held;

/* seen: how far the consumer may be, at most that far. */
inline refresh_consumed(limit)
{
	load_acquire(RX_POSITION, seen);
	limit = tx_position;
#ifndef WITHOUT_RULE
	if
	:: held ->
		forget_load(CONTROL, control);
		if
		:: control == BUSY -> limit = 0
		:: else -> held = 0
		fi
	:: else
	fi;
#endif
	control = 0
}

active proctype holder()
{
	THREAD(0);

	atomic {
		yield();
		learn(LOCKS);
		store(CONTROL, BUSY);
		tx_position = 1;
		held = 1;
		tell(LOCKS);
		yield();
		plain_write(0, 1);
		finish_store(CONTROL, MESSAGE)
	}
}

active proctype liar()
{
	THREAD(LIAR);

	atomic {
		yield();
		store(RX_POSITION, 1)
	}
}

active proctype sender()
{
	THREAD(2);
	byte tries, limit, control;

	atomic {
		do
		:: tries < TRIES ->
			tries++;
			yield();
			learn(LOCKS);
			if
			:: tx_position ->
				refresh_consumed(limit);
				if
				:: seen > limit -> tries = TRIES /* -EPROTO */
				:: seen == tx_position && seen <= limit ->
					plain_write(0, 2);
					tries = TRIES
				:: else
				fi
			:: else
			fi;
			seen = 0;
			limit = 0;
			tell(LOCKS)
		:: else -> break
		od
	}
}
