// SPDX-License-Identifier: MIT
/*
 * A C program at channels that module/kucomms_kup.c has numbered, by client.h:
 *
 *	kup_client connect URL MILLISECONDS	says the number of its channel
 *	kup_client blocking|looking|polling URL	plays all that a user begins
 *	kup_client kernel URL HOPS		plays what the kernel has begun
 *	kup_client full URL			fills the ring with what is echoed
 *	kup_client end URL			waits for the end
 *	kup_client turns URL			plays by turns what is echoed
 *	kup_client threads URL...		a channel for each thread
 *
 * Says what was wrong and exits with 1, or with the errno of a connect that failed.
 */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <kucomms/client.h>

#define PATIENCE_MS	60000
#define ROUNDS		20
#define THREADS_MAX	16

enum { ECHO = 0, NONCE, COUNT, DONE = 8 };
enum how { BLOCKING, LOOKING, POLLING };

#define CHECK(condition)							\
	do {									\
		if (!(condition)) {						\
			fprintf(stderr, "line %d: %s\n", __LINE__, #condition);	\
			exit(1);						\
		}								\
	} while (0)

static void connect_or_exit(struct kucomms_client *link, const char *url, int timeout)
{
	int err = kucomms_connect(link, url, 0, timeout);

	if (err)
		exit(-err);
}

/* The next message, in one of three ways. */
static void receive(struct kucomms_client *link, struct kucomms_view *message, enum how how)
{
	int64_t end = kucomms_deadline(PATIENCE_MS);
	struct pollfd fd;
	int err;

	if (how == BLOCKING) {
		CHECK(!kucomms_client_receive(link, message, PATIENCE_MS));
		return;
	}
	fd.fd = kucomms_client_fd(link);
	fd.events = POLLIN;
	for (;;) {
		err = kucomms_client_receive(link, message, 0);
		if (!err)
			return;
		CHECK(err == -EAGAIN && kucomms_poll_time(end));
		if (how == POLLING) {
			err = kucomms_client_arm(link, 1, -1);
			CHECK(err >= 0);
			if (!err)
				CHECK(poll(&fd, 1, PATIENCE_MS) == 1);
		}
	}
}

static uint64_t receive_number(struct kucomms_client *link, enum how how, uint64_t type)
{
	struct kucomms_view message;
	uint64_t number;

	receive(link, &message, how);
	CHECK(message.type == type && message.length == sizeof(number));
	memcpy(&number, message.data, sizeof(number));
	kucomms_client_release(link, &message);
	return number;
}

static void send_number(struct kucomms_client *link, uint64_t type, uint64_t id, uint64_t number)
{
	CHECK(!kucomms_client_send(link, &number, sizeof(number), type, id, 0, PATIENCE_MS));
}

static void user_begins(struct kucomms_client *link, enum how how)
{
	uint64_t number, sent = 0x123456789abcdef;
	int hops, hop, round;

	for (hops = 1; hops <= 2; hops++) {
		for (round = 0; round < ROUNDS; round++) {
			sent = sent * 6364136223846793005 + 1;
			number = sent;
			for (hop = 0; hop < hops; hop++) {
				send_number(link, ECHO, 0, number);
				number = receive_number(link, how, ECHO);
				CHECK(number == sent);
			}
		}
	}
	for (number = 0; number < 2 * ROUNDS; number += 2) {
		send_number(link, COUNT, 0, number);
		CHECK(receive_number(link, how, COUNT) == number + 1);
	}
}

static void kernel_begins(struct kucomms_client *link, int hops)
{
	uint64_t number, first;
	int round, hop;

	for (round = 0; round < ROUNDS; round++) {
		for (hop = 0; hop < hops; hop++) {
			number = receive_number(link, BLOCKING, NONCE);
			if (!hop)
				first = number;
			CHECK(number == first);
			send_number(link, NONCE, (uint64_t)hop, number);
		}
	}
	CHECK(receive_number(link, BLOCKING, DONE) == (uint64_t)(ROUNDS * hops));
}

/* Until neither side has room, then all of it back; and twice, waiting for room by poll(). */
static void fill(struct kucomms_client *link)
{
	static unsigned char data[100000];
	uint64_t sent = 0, received = 0;
	struct kucomms_view message;
	struct pollfd fd;
	int err;

	while (!kucomms_client_send(link, data, sizeof(data), ECHO, sent, 0, 200))
		sent++;
	CHECK(sent > 10);
	fd.fd = kucomms_client_fd(link);
	fd.events = POLLIN;
	while (sent < 200 || received < sent) {
		err = sent < 200 ? kucomms_client_send(link, data, sizeof(data), ECHO, sent, 0, 0) :
				   -EAGAIN;
		CHECK(!err || err == -EAGAIN);
		sent += !err;
		err = kucomms_client_receive(link, &message, 0);
		if (!err) {
			CHECK(message.id == received++ && message.length == sizeof(data));
			kucomms_client_release(link, &message);
			continue;
		}
		CHECK(err == -EAGAIN);
		err = kucomms_client_arm(link, 1, sent < 200 ? (ssize_t)sizeof(data) : -1);
		CHECK(err >= 0);
		if (!err)
			CHECK(poll(&fd, 1, PATIENCE_MS) == 1);
	}
}

static void wait_for_end(struct kucomms_client *link)
{
	struct kucomms_view message;

	puts("open");
	fflush(stdout);
	CHECK(kucomms_client_receive(link, &message, PATIENCE_MS) == -ESHUTDOWN);
	CHECK(kucomms_client_receive(link, &message, 0) == -ESHUTDOWN);
	CHECK(kucomms_client_send(link, "", 0, 0, 0, 0, 0) == -ESHUTDOWN);
}

static void *talk(void *url)
{
	struct kucomms_client link;

	connect_or_exit(&link, (const char *)url, PATIENCE_MS);
	user_begins(&link, BLOCKING);
	kucomms_client_close(&link);
	return NULL;
}

static void in_threads(char **urls, int count)
{
	pthread_t threads[THREADS_MAX];
	int i;

	CHECK(count <= THREADS_MAX);
	for (i = 0; i < count; i++)
		CHECK(!pthread_create(&threads[i], NULL, talk, urls[i]));
	for (i = 0; i < count; i++)
		CHECK(!pthread_join(threads[i], NULL));
}

/* One message there, one back, and at last a token. */
static void in_turns(struct kucomms_client *link)
{
	struct kucomms_view message;
	uint64_t number;

	CHECK(kucomms_client_has_turns(link));
	for (number = 0; number < 1000; number++) {
		CHECK(kucomms_client_has_turn(link));
		send_number(link, ECHO, 0, number);
		CHECK(!kucomms_client_has_turn(link));
		CHECK(kucomms_client_send(link, "x", 1, ECHO, 0, 0, -1) == -EPERM);
		CHECK(kucomms_client_pass_turn(link, -1) == -EPERM);
		CHECK(receive_number(link, BLOCKING, ECHO) == number);
	}
	CHECK(!kucomms_client_pass_turn(link, PATIENCE_MS));
	receive(link, &message, BLOCKING);
	CHECK(message.flags == KUCOMMS_FLAG_TOKEN && !message.length);
	kucomms_client_release(link, &message);
	CHECK(kucomms_client_has_turn(link));
}

int main(int argc, char **argv)
{
	const char *what = argc > 2 ? argv[1] : "";
	struct kucomms_client link;

	if (!strcmp(what, "threads")) {
		in_threads(argv + 2, argc - 2);
		return 0;
	}
	CHECK(argc > 2);
	connect_or_exit(&link, argv[2], argc > 3 && !strcmp(what, "connect") ? atoi(argv[3]) :
									      PATIENCE_MS);
	if (!strcmp(what, "connect"))
		printf("%lld\n", (long long)link.number);
	else if (!strcmp(what, "blocking"))
		user_begins(&link, BLOCKING);
	else if (!strcmp(what, "looking"))
		user_begins(&link, LOOKING);
	else if (!strcmp(what, "polling"))
		user_begins(&link, POLLING);
	else if (!strcmp(what, "kernel"))
		kernel_begins(&link, argc > 3 ? atoi(argv[3]) : 1);
	else if (!strcmp(what, "full"))
		fill(&link);
	else if (!strcmp(what, "turns"))
		in_turns(&link);
	else if (!strcmp(what, "end"))
		wait_for_end(&link);
	else
		CHECK(0);
	kucomms_client_close(&link);
	kucomms_client_close(&link);	/* twice is fine */
	return 0;
}
