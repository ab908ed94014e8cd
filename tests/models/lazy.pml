/* SPDX-License-Identifier: MIT */
/*
 * As park.pml, with a consumer that releases lazily: while it goes on reading it
 * lets the producer sleep, but it thinks of it before it stops.
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
					wake_consumer();
					hear(tx_bell)
				fi
			fi
		:: else -> break
		od
	}
}

active proctype consumer()
{
	THREAD(CONSUMER);
	byte before;
	bit owing;

	atomic {
		do
		:: rx_position < MESSAGES ->
			peek();
			if
			:: yes ->
				consume();
				release_lazily()
			:: else ->
#ifndef WITHOUT_DUTY
				if
				:: owing -> wake_producer(); owing = 0
				:: else
				fi;
#endif
				park_for_data();
				if
				:: yes
				:: else -> hear(rx_bell)
				fi
			fi
		:: else -> break
		od;
#ifndef WITHOUT_DUTY
		if
		:: owing -> wake_producer()
		:: else
		fi
#endif
	}
}
