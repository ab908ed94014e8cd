/* SPDX-License-Identifier: GPL-2.0-only OR MIT */
/*
 * A C program as one end of a link: sends messages of growing length to an
 * echo server and checks each answer.
 *
 *	cc -O2 -I$(python -c 'import kucomms; print(kucomms.get_include())') \
 *		c_sender.c -o c_sender
 *	./cpp_echo_server shm://echo &
 *	./c_sender shm://echo 1000
 */
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include <kucomms/client.h>

#define TYPE_ECHO	1
#define TIMEOUT_MS	10000
#define STEP		7	/* bytes by which each message is longer */

static volatile sig_atomic_t stop;

static void on_signal(int number)
{
	(void)number;
	stop = 1;
	/*
	 * A signal between the look at the flag and the wait interrupts
	 * nothing. The alarm comes here again, until the program has ended.
	 */
	alarm(1);
}

static void catch_signals(void)
{
	struct sigaction action;

	memset(&action, 0, sizeof(action));
	action.sa_handler = on_signal;	/* no SA_RESTART: waits give -EINTR */
	sigaction(SIGINT, &action, NULL);
	sigaction(SIGTERM, &action, NULL);
	sigaction(SIGALRM, &action, NULL);
}

/* Any bytes will do, as long as neighbouring messages differ. */
static void fill(unsigned char *data, size_t length, uint64_t id)
{
	size_t i;

	for (i = 0; i < length; i++)
		data[i] = (unsigned char)(id * 31 + i);
}

/* One message and its echo. Return: 0, 1 when the echo is wrong, -errno. */
static int exchange(struct kucomms_client *link, const unsigned char *data,
		    size_t length, uint64_t id)
{
	struct kucomms_view echo;
	int err;

	err = kucomms_client_send(link, data, length, TYPE_ECHO, id, ~id,
				  TIMEOUT_MS);
	if (err)
		return err;
	err = kucomms_client_receive(link, &echo, TIMEOUT_MS);
	if (err)
		return err;
	err = echo.type != TYPE_ECHO || echo.id != id ||
	      echo.user_value != ~id || echo.length != length ||
	      memcmp(echo.data, data, length);
	kucomms_client_release(link, &echo);
	return err;
}

int main(int argc, char **argv)
{
	unsigned long long count = 1000, done, bytes = 0;
	struct kucomms_client link;
	size_t length, most;
	unsigned char *data;
	int64_t begin, spent;
	char *end = NULL;
	int err;

	if (argc == 3)
		count = strtoull(argv[2], &end, 10);
	if (argc < 2 || argc > 3 || (end && (*end || end == argv[2]))) {
		fprintf(stderr, "usage: %s shm://NAME [MESSAGES]\n"
			"MESSAGES: 1000 by default, 0 goes on until SIGINT\n",
			argv[0]);
		return 2;
	}
	catch_signals();
	err = kucomms_connect(&link, argv[1], 0, TIMEOUT_MS);
	if (err) {
		fprintf(stderr, "%s: %s\n", argv[1], strerror(-err));
		return 1;
	}
	most = kucomms_message_max(link.channel.ring_size);
	data = malloc(most);
	if (!data) {
		err = -ENOMEM;
		most = 0;
	}
	begin = kucomms_now(CLOCK_MONOTONIC);
	for (done = 0; !err && !stop && (!count || done < count); done++) {
		length = done * STEP % (most + 1);
		fill(data, length, done);
		err = exchange(&link, data, length, done);
		if (err)
			break;
		bytes += length;
	}
	spent = kucomms_now(CLOCK_MONOTONIC) - begin;
	kucomms_client_close(&link);
	free(data);
	if (stop && err == -EINTR)
		err = 0;
	if (err) {
		fprintf(stderr, "%s: message %llu: %s\n", argv[1], done,
			err > 0 ? "the echo is wrong" : strerror(-err));
		return 1;
	}
	printf("%llu messages, %llu bytes echoed, %.1f us each\n", done, bytes,
	       done ? (double)spent / 1000 / (double)done : 0.0);
	return 0;
}
