/* SPDX-License-Identifier: MIT */
/*
 * A consumer keeps its first message pinned until the last one comes, as a handler
 * does that waits for a reply; the others fill the ring. It learns that nothing
 * more can come, drops the pin, and all arrive.
 */
#define SLOTS		2
#define MESSAGES	4
#define VALUES		6

#include "ring_model.h"

active proctype producer()
{
	THREAD(PRODUCER);

	atomic {
		do
		:: tx_position < MESSAGES ->
			has_room(1);
			if
			:: yes ->
				publish();
				wake_consumer()
			:: else ->
				park_for_space(1);
				if
				:: yes
				:: else ->
#ifndef WITHOUT_RINGING
					wake_consumer();
#endif
					hear(tx_bell)
				fi
			fi
		:: else -> break
		od
	}
}

inline producer_starves()
{
	load(TX_WANTED, seen);
	yes = (pinned && seen > SLOTS - (rx_available - rx_published));
	seen = 0
}

active proctype consumer()
{
	THREAD(CONSUMER);
	byte before;
	bit pinned = 1;

	atomic {
		do
		:: rx_position < MESSAGES ->
			peek();
			if
			:: yes ->
				consume();
				if
				:: !pinned -> release()
				:: else
				fi
			:: else ->
				park_for_data();
				if
				:: yes
				:: else ->
					producer_starves();
					if
					:: yes ->
						/* Nobody has touched it. */
						plain_read(DATA(0), seen);
						assert(seen == 1);
						seen = 0;
						pinned = 0;
						release()
					:: else -> hear(rx_bell)
					fi
				fi
			fi
		:: else -> break
		od
	}
}
