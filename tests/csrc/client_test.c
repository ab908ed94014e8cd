/* SPDX-License-Identifier: GPL-2.0-only OR MIT */
/*
 * Unit tests of client.h: what each call returns, when; and what it does about
 * a peer that says nonsense. Both ends are threads of this process. Sockets go
 * to $XDG_RUNTIME_DIR, which must be empty before and is after.
 */
#define _GNU_SOURCE
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/wait.h>

#include <kucomms/client.h>

#define URL	"shm://client_test"

#define CHECK(condition)						\
	do {								\
		if (!(condition)) {					\
			fprintf(stderr, "%s:%d: %s: not so: %s\n",	\
				__FILE__, __LINE__, __func__,		\
				#condition);				\
			exit(1);					\
		}							\
	} while (0)

static char directory[PATH_MAX];

/* ---- two ends ---------------------------------------------------------------- */

struct pair {
	struct kucomms_listener listener;
	struct kucomms_client a;	/* accepted */
	struct kucomms_client b;	/* connected */
	uint64_t asked;
	int err;
};

static void *connect_b(void *argument)
{
	struct pair *pair = argument;

	pair->err = kucomms_connect(&pair->b, URL, pair->asked, 5000);
	return NULL;
}

static void pair_open(struct pair *pair, uint64_t ring_size, uint64_t asked)
{
	pthread_t thread;

	pair->asked = asked;
	CHECK(!kucomms_listener_open(&pair->listener, URL, ring_size));
	CHECK(!pthread_create(&thread, NULL, connect_b, pair));
	CHECK(!kucomms_listener_accept(&pair->listener, &pair->a, 5000));
	CHECK(!pthread_join(thread, NULL));
	CHECK(!pair->err);
}

static void pair_close(struct pair *pair)
{
	kucomms_client_close(&pair->a);
	kucomms_client_close(&pair->b);
	kucomms_listener_close(&pair->listener);
	CHECK(access(directory, F_OK) && errno == ENOENT);
}

static int send_text(struct kucomms_client *client, const char *text, int timeout)
{
	return kucomms_client_send(client, text, strlen(text), 1, 2, 3,
				   timeout);
}

static void expect_text(struct kucomms_client *client, const char *text)
{
	struct kucomms_view view;

	CHECK(!kucomms_client_receive(client, &view, 5000));
	CHECK(view.length == strlen(text));
	CHECK(!memcmp(view.data, text, view.length));
	kucomms_client_release(client, &view);
}

static int receive_nothing(struct kucomms_client *client, int timeout)
{
	struct kucomms_view view;

	return kucomms_client_receive(client, &view, timeout);
}

static int is_readable(int fd)
{
	struct pollfd ready;

	ready.fd = fd;
	ready.events = POLLIN;
	return poll(&ready, 1, 0) == 1;
}

/* ---- names and timeouts -------------------------------------------------------- */

static void test_urls(void)
{
	static const char *const bad[] = {
		"", "shm:", "shm://", "shm://a/b", "shm://a?b", "shm://a-b",
		"shm://\xc3\xa9", "shm:///a", "SHM://a", "inproc://a",
		"shm://0123456789012345678901234567890123456789012345678",
		"shm://a/3", "kernel://", "kernel://a/", "kernel://a/03",
		"kernel://a/-1", "kernel://a/3/", "kernel://a/4294967296",
		"kernel://a/99999999999999999999999", "kernel://a?3",
	};
	struct kucomms_listener listener;
	struct kucomms_client client;
	size_t i;

	for (i = 0; i < sizeof(bad) / sizeof(*bad); i++) {
		CHECK(kucomms_connect(&client, bad[i], 0, 0) == -EINVAL);
		CHECK(kucomms_listener_open(&listener, bad[i], 0) == -EINVAL);
		kucomms_client_close(&client);
		kucomms_listener_close(&listener);
	}
	CHECK(!kucomms_listener_open(&listener, "shm://"
			"aZ_012345678901234567890123456789012345678901234", 0));
	kucomms_listener_close(&listener);
	CHECK(kucomms_listener_open(&listener, URL, KUCOMMS_RING_MAX + 1) ==
	      -EINVAL);
}

/* What the kernel side is like, tests/kernel/programs/kup_client.c shows. */
static void test_no_device(void)
{
	static const char *const urls[] = {
		"kernel://no_device_is_called_so", "kernel://nor_so/0",
		"kernel://nor_so/4294967295",
	};
	struct kucomms_listener listener;
	struct kucomms_client client;
	char name[KUCOMMS_NAME_MAX + 1];
	int64_t number;
	size_t i;

	for (i = 0; i < sizeof(urls) / sizeof(*urls); i++) {
		CHECK(kucomms_connect(&client, urls[i], 0, 0) == -EAGAIN);
		CHECK(kucomms_connect(&client, urls[i], 0, 30) == -ETIMEDOUT);
		CHECK(kucomms_client_fd(&client) == -EBADF);
		kucomms_client_close(&client);
		CHECK(kucomms_listener_open(&listener, urls[i], 0) == -EINVAL);
		kucomms_listener_close(&listener);
	}
	CHECK(!kucomms_url_channel(urls[0], name, &number) && number == -1);
	CHECK(!kucomms_url_channel(urls[1], name, &number) && !number);
	CHECK(!kucomms_url_channel(urls[2], name, &number));
	CHECK(number == UINT32_MAX && !strcmp(name, "nor_so"));
}

static void test_nobody(void)
{
	struct kucomms_listener listener;
	struct kucomms_client client;
	int64_t begin;

	CHECK(kucomms_connect(&client, URL, 0, 0) == -EAGAIN);
	begin = kucomms_now(CLOCK_MONOTONIC);
	CHECK(kucomms_connect(&client, URL, 0, 30) == -ETIMEDOUT);
	CHECK(kucomms_now(CLOCK_MONOTONIC) - begin >= 30000000);
	CHECK(!kucomms_listener_open(&listener, "shm://somebody_else", 0));
	CHECK(kucomms_connect(&client, URL, 0, 0) == -EAGAIN);
	CHECK(kucomms_listener_accept(&listener, &client, 0) == -EAGAIN);
	CHECK(kucomms_listener_accept(&listener, &client, 30) == -ETIMEDOUT);
	kucomms_client_close(&client);
	kucomms_listener_close(&listener);
	kucomms_listener_close(&listener);
	CHECK(send_text(&client, "x", 0) == -EBADF);
	CHECK(receive_nothing(&client, 0) == -EBADF);
	CHECK(kucomms_client_fd(&client) == -EBADF);
	CHECK(kucomms_client_arm(&client, 1, -1) == -EBADF);
}

/* A listener that does not accept has its time, and then is given up. */
static void test_listener_says_nothing(void)
{
	struct kucomms_listener listener;
	struct kucomms_client client;

	CHECK(!kucomms_listener_open(&listener, URL, 0));
	CHECK(kucomms_connect(&client, URL, 0, 50) == -ETIMEDOUT);
	/* Whom it turns to next is gone already. */
	CHECK(kucomms_listener_accept(&listener, &client, 0) == -EAGAIN ||
	      listener.dropped == 1);
	kucomms_listener_close(&listener);
}

static void test_name_is_taken(void)
{
	struct kucomms_listener first, second;
	struct stat before, after;

	CHECK(!kucomms_listener_open(&first, URL, 0));
	CHECK(kucomms_listener_open(&second, URL, 0) == -EADDRINUSE);
	kucomms_listener_close(&second);
	CHECK(!kucomms_listener_open(&second, URL "2", 0));
	kucomms_listener_close(&first);
	CHECK(!access(directory, F_OK));	/* the other is still in it */
	CHECK(!kucomms_listener_open(&first, URL, 0));
	kucomms_listener_close(&first);
	kucomms_listener_close(&second);
	CHECK(access(directory, F_OK));

	/* Dead: nobody listens at what is there. */
	CHECK(!kucomms_listener_open(&first, URL, 0));
	shutdown(first.socket, SHUT_RDWR);
	CHECK(!kucomms_listener_open(&second, URL, 0));
	/* The first one does not take the second one's socket away. */
	CHECK(!stat(directory, &before));
	kucomms_listener_close(&first);
	CHECK(!stat(directory, &after));
	CHECK(before.st_ino == after.st_ino);
	CHECK(kucomms_listener_open(&first, URL, 0) == -EADDRINUSE);
	kucomms_listener_close(&second);
	CHECK(access(directory, F_OK));
}

/* Somebody stands still while he takes a name. */
static void test_directory_is_locked(void)
{
	struct kucomms_listener listener, second;
	int lock;

	CHECK(!kucomms_listener_open(&listener, URL, 0));
	lock = open(directory, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	CHECK(lock >= 0 && !flock(lock, LOCK_EX));
	CHECK(kucomms_listener_open(&second, URL "2", 0) == -EWOULDBLOCK);
	kucomms_listener_close(&second);
	kucomms_listener_close(&listener);
	CHECK(!access(directory, F_OK));	/* as if it had been killed */
	close(lock);
	CHECK(!kucomms_listener_open(&listener, URL, 0));
	kucomms_listener_close(&listener);
	CHECK(access(directory, F_OK));
}

static void test_directory_of_others(void)
{
	struct kucomms_listener listener;
	struct kucomms_client client;

	CHECK(!mkdir(directory, 0700));
	CHECK(!chmod(directory, 0750));
	CHECK(kucomms_listener_open(&listener, URL, 0) == -EPERM);
	CHECK(kucomms_connect(&client, URL, 0, 0) == -EPERM);
	CHECK(!rmdir(directory));
	CHECK(!symlink("/", directory));
	CHECK(kucomms_listener_open(&listener, URL, 0) < 0);
	CHECK(kucomms_connect(&client, URL, 0, 0) < 0);
	CHECK(!unlink(directory));
}

/* ---- a link ----------------------------------------------------------------------- */

static void test_messages(void)
{
	struct kucomms_view view, again;
	static struct pair pair;

	pair_open(&pair, 0, 0);
	CHECK(pair.a.channel.ring_size == KUCOMMS_RING_DEFAULT);
	CHECK(pair.b.channel.ring_size == KUCOMMS_RING_DEFAULT);
	CHECK(pair.a.peer_pid == getpid() && pair.b.peer_pid == getpid());
	CHECK(pair.a.peer_uid == geteuid() && pair.b.peer_uid == geteuid());
	CHECK(receive_nothing(&pair.a, 0) == -EAGAIN);
	CHECK(receive_nothing(&pair.b, 20) == -ETIMEDOUT);
	CHECK(!kucomms_client_send(&pair.a, "one", 3, UINT64_MAX, 0, 7, 0));
	CHECK(!kucomms_client_send(&pair.a, NULL, 0, 4, 5, 6, 0));
	CHECK(!kucomms_client_receive(&pair.b, &view, 0));
	CHECK(view.length == 3 && !memcmp(view.data, "one", 3));
	CHECK(view.type == UINT64_MAX && !view.id && view.user_value == 7);
	CHECK(!view.flags);
	CHECK(!kucomms_client_receive(&pair.b, &again, 0));
	CHECK(again.data == view.data && again.length == view.length);
	CHECK(!kucomms_client_reply(&pair.b, &view, "two!", 4, 0));
	kucomms_client_release(&pair.b, &view);
	CHECK(!kucomms_client_receive(&pair.b, &view, 0));
	CHECK(!view.length && view.type == 4 && view.id == 5 &&
	      view.user_value == 6);
	kucomms_client_release(&pair.b, &view);
	CHECK(!kucomms_client_receive(&pair.a, &view, 0));
	CHECK(view.flags == KUCOMMS_FLAG_REPLY && view.length == 4);
	CHECK(view.type == UINT64_MAX && !view.id && view.user_value == 7);
	kucomms_client_release(&pair.a, &view);
	pair_close(&pair);
}

static void *send_forty(void *argument)
{
	static unsigned char data[1000];
	struct kucomms_client *client = argument;
	uint64_t id;

	for (id = 0; id < 40; id++) {
		memset(data, (int)id, sizeof(data));
		CHECK(!kucomms_client_send(client, data, sizeof(data), 0, id, 0,
					   5000));
	}
	return NULL;
}

/* What is held stays what it was; the peer waits for its room. */
static void test_held(void)
{
	static const unsigned int order[] = { 3, 1, 0, 2 };
	struct kucomms_view view[4], next;
	struct kucomms_pin pin[4];
	static struct pair pair;
	pthread_t thread;
	unsigned int i, k;
	uint64_t id = 0;

	pair_open(&pair, 8192, 0);
	CHECK(!pthread_create(&thread, NULL, send_forty, &pair.a));
	while (id < 40) {
		for (i = 0; i < 4; i++) {
			CHECK(!kucomms_client_receive(&pair.b, &view[i], 5000));
			CHECK(view[i].id == id++);
			kucomms_client_hold(&pair.b, &view[i], &pin[i]);
		}
		/* More than the ring has left has to wait for the oldest. */
		for (i = 0; i < 3 && id < 40; i++, id++) {
			CHECK(!kucomms_client_receive(&pair.b, &next, 5000));
			CHECK(next.id == id);
			kucomms_client_release(&pair.b, &next);
		}
		if (id < 40)
			CHECK(receive_nothing(&pair.b, 20) == -ETIMEDOUT);
		for (i = 0; i < 4; i++) {
			k = order[i];
			CHECK(view[k].data[0] == view[k].id);
			CHECK(view[k].data[999] == view[k].id);
			kucomms_client_let_go(&pair.b, &pin[k]);
		}
		if (id > 36)
			break;
	}
	for (; id < 40; id++) {
		CHECK(!kucomms_client_receive(&pair.b, &next, 5000));
		CHECK(next.id == id);
		kucomms_client_hold(&pair.b, &next, &pin[0]);
		kucomms_client_let_go(&pair.b, &pin[0]);
	}
	CHECK(!pthread_join(thread, NULL));
	CHECK(!send_text(&pair.a, "held", 0));
	CHECK(!kucomms_client_receive(&pair.b, &next, 5000));
	kucomms_client_hold(&pair.b, &next, &pin[0]);
	pair_close(&pair);
	kucomms_client_let_go(&pair.b, &pin[0]);
}

static void test_ring_sizes(void)
{
	static struct pair pair;

	pair_open(&pair, 5000, 0);
	CHECK(pair.a.channel.ring_size == 8192);
	CHECK(pair.b.channel.ring_size == 8192);
	pair_close(&pair);
	pair_open(&pair, 5000, 100000);
	CHECK(pair.a.channel.ring_size == 131072);
	CHECK(pair.b.channel.ring_size == 131072);
	pair_close(&pair);
	pair_open(&pair, 0, 1);
	CHECK(pair.b.channel.ring_size == kucomms_page_size());
	pair_close(&pair);
	pair_open(&pair, 0, KUCOMMS_RING_LIMIT * 2);
	CHECK(pair.a.channel.ring_size == KUCOMMS_RING_LIMIT);
	CHECK(pair.b.channel.ring_size == KUCOMMS_RING_LIMIT);
	pair_close(&pair);
}

static void test_full(void)
{
	static unsigned char data[8192];
	static struct pair pair;
	struct kucomms_view view;
	size_t most;

	pair_open(&pair, 4096, 0);
	most = kucomms_message_max(pair.a.channel.ring_size);
	CHECK(most <= sizeof(data));
	CHECK(!kucomms_client_send(&pair.a, data, most, 0, 0, 0, 0));
	CHECK(kucomms_client_send(&pair.a, data, most + 1, 0, 0, 0, -1) ==
	      -EMSGSIZE);
	CHECK(kucomms_client_send(&pair.a, data, (size_t)UINT32_MAX + 1, 0, 0,
				  0, -1) == -EMSGSIZE);
	CHECK(kucomms_client_send(&pair.a, data, 0, 0, 0, 0, 0) == -EAGAIN);
	CHECK(kucomms_client_send(&pair.a, data, 0, 0, 0, 0, 20) ==
	      -ETIMEDOUT);
	CHECK(!kucomms_client_receive(&pair.b, &view, 0));
	CHECK(view.length == most);
	CHECK(kucomms_client_send(&pair.a, data, 0, 0, 0, 0, 0) == -EAGAIN);
	kucomms_client_release(&pair.b, &view);
	CHECK(!kucomms_client_send(&pair.a, data, most, 0, 0, 0, 0));
	pair_close(&pair);
}

#define MANY	20000

static void *send_many(void *argument)
{
	struct kucomms_client *client = argument;
	static unsigned char data[3000];
	uint64_t i;

	for (i = 0; i < MANY; i++)
		CHECK(!kucomms_client_send(client, data, i % sizeof(data), 0,
					   i, 0, 20000));
	return NULL;
}

/* Both sleep and wake each other, over and over. */
static void test_waiting(void)
{
	static struct pair pair;
	struct kucomms_view view;
	pthread_t thread;
	uint64_t i;

	pair_open(&pair, 4096, 0);
	CHECK(!pthread_create(&thread, NULL, send_many, &pair.a));
	for (i = 0; i < MANY; i++) {
		CHECK(!kucomms_client_receive(&pair.b, &view, 20000));
		CHECK(view.id == i && view.length == i % 3000);
		kucomms_client_release(&pair.b, &view);
	}
	CHECK(!pthread_join(thread, NULL));
	pair_close(&pair);
}

static void test_close(void)
{
	static struct pair pair;

	pair_open(&pair, 4096, 0);
	CHECK(!send_text(&pair.a, "last", 0));
	CHECK(!send_text(&pair.a, "words", 0));
	kucomms_client_close(&pair.a);
	kucomms_client_close(&pair.a);
	CHECK(send_text(&pair.a, "x", 0) == -EBADF);
	CHECK(receive_nothing(&pair.a, -1) == -EBADF);
	CHECK(send_text(&pair.b, "x", -1) == -EPIPE);
	expect_text(&pair.b, "last");
	expect_text(&pair.b, "words");
	CHECK(receive_nothing(&pair.b, -1) == -EPIPE);
	CHECK(receive_nothing(&pair.b, 0) == -EPIPE);
	CHECK(send_text(&pair.b, "x", 0) == -EPIPE);
	pair_close(&pair);
}

/* No orderly end: what is half-written is skipped, the rest delivered. */
static void test_death(void)
{
	static struct pair pair;
	struct kucomms_frame *frame;

	pair_open(&pair, 4096, 0);
	CHECK(!kucomms_channel_reserve(&pair.a.channel, 10, &frame, NULL));
	CHECK(!send_text(&pair.a, "last words", 0));
	CHECK(receive_nothing(&pair.b, 0) == -EAGAIN);
	shutdown(pair.a.socket, SHUT_RDWR);
	expect_text(&pair.b, "last words");
	CHECK(receive_nothing(&pair.b, -1) == -EPIPE);
	CHECK(send_text(&pair.b, "x", 0) == -EPIPE);
	pair_close(&pair);
}

/*
 * A process that listens, has a link, and leaves a child behind that holds all
 * of its descriptors until @hold is closed.
 */
static void serve_and_leave_child(int hold)
{
	struct kucomms_listener listener;
	struct kucomms_client client;
	char nothing;

	CHECK(!kucomms_listener_open(&listener, URL, 0));
	CHECK(!kucomms_listener_accept(&listener, &client, 20000));
	if (!fork()) {
		CHECK(!read(hold, &nothing, 1));
		_exit(0);
	}
	CHECK(!send_text(&client, "last words", 0));
	for (;;)
		pause();
}

/* No end of file then: it is the pidfd that tells, here and when listening. */
static void test_death_with_descriptors_held(void)
{
	struct kucomms_listener listener;
	struct kucomms_client client;
	int hold[2];
	pid_t child;

	CHECK(!pipe(hold));
	child = fork();
	CHECK(child >= 0);
	if (!child) {
		close(hold[1]);
		serve_and_leave_child(hold[0]);
	}
	close(hold[0]);
	CHECK(!kucomms_connect(&client, URL, 0, 20000));
	CHECK(client.peer_pid == child);
	expect_text(&client, "last words");
	CHECK(kucomms_listener_open(&listener, URL, 0) == -EADDRINUSE);
	CHECK(receive_nothing(&client, 20) == -ETIMEDOUT);
	CHECK(!kill(child, SIGKILL));
	CHECK(receive_nothing(&client, 20000) == -EPIPE);
	CHECK(send_text(&client, "x", 0) == -EPIPE);
	kucomms_client_close(&client);
	CHECK(!kucomms_listener_open(&listener, URL, 0));
	CHECK(waitpid(child, NULL, 0) == child);
	kucomms_listener_close(&listener);
	close(hold[1]);
}

/* Who only sends, and never has to wait, sees it as well. */
static void test_death_seen_by_sender(void)
{
	static struct pair pair;
	int64_t begin;
	int err;

	pair_open(&pair, 1 << 24, 0);
	CHECK(!send_text(&pair.b, "x", 0));
	shutdown(pair.a.socket, SHUT_RDWR);
	begin = kucomms_now(CLOCK_MONOTONIC);
	do {
		err = send_text(&pair.b, "x", 0);
		if (err == -EAGAIN) {	/* faster than expected: start over */
			pair.a.channel.rx.position =
				__atomic_load_n(&pair.b.channel.tx.position,
						__ATOMIC_RELAXED);
			kucomms_channel_release(&pair.a.channel);
			err = 0;
		}
	} while (!err);
	CHECK(err == -EPIPE);
	CHECK(kucomms_now(CLOCK_MONOTONIC) - begin < 1000000000);
	pair_close(&pair);
}

static void *close_later(void *argument)
{
	struct kucomms_client *client = argument;

	/* Until the other side has parked. */
	while (!__atomic_load_n(&client->channel.tx.peer->parked,
				__ATOMIC_RELAXED))
		sched_yield();
	kucomms_client_close(client);
	return NULL;
}

static void test_close_wakes(void)
{
	static struct pair pair;
	pthread_t thread;

	pair_open(&pair, 4096, 0);
	CHECK(!pthread_create(&thread, NULL, close_later, &pair.a));
	CHECK(receive_nothing(&pair.b, -1) == -EPIPE);
	CHECK(!pthread_join(thread, NULL));
	pair_close(&pair);
}

static void test_discarded_space_comes_back(void)
{
	static struct pair pair;
	struct kucomms_frame *frame;
	uint32_t most;

	pair_open(&pair, 4096, 0);
	most = (uint32_t)kucomms_message_max(pair.a.channel.ring_size);
	CHECK(!kucomms_channel_reserve(&pair.a.channel, most, &frame,
				       NULL));
	kucomms_channel_discard(&pair.a.channel, frame, most);
	CHECK(send_text(&pair.a, "x", 0) == -EAGAIN);
	CHECK(receive_nothing(&pair.b, 0) == -EAGAIN);
	CHECK(!send_text(&pair.a, "x", 0));
	expect_text(&pair.b, "x");
	pair_close(&pair);
}

static void on_alarm(int number)
{
	(void)number;
}

static void test_signal(void)
{
	struct kucomms_client client;
	struct sigaction action;
	static struct pair pair;

	memset(&action, 0, sizeof(action));
	action.sa_handler = on_alarm;
	CHECK(!sigaction(SIGALRM, &action, NULL));
	pair_open(&pair, 0, 0);
	alarm(1);
	CHECK(receive_nothing(&pair.b, -1) == -EINTR);
	CHECK(!send_text(&pair.a, "still there", 0));
	expect_text(&pair.b, "still there");
	alarm(1);
	CHECK(kucomms_listener_accept(&pair.listener, &client, -1) == -EINTR);
	pair_close(&pair);
}

/* ---- poll loops ------------------------------------------------------------------- */

static void test_arm(void)
{
	static unsigned char data[8192];
	static struct pair pair;
	size_t most;
	int fd;

	pair_open(&pair, 4096, 0);
	most = kucomms_message_max(pair.a.channel.ring_size);
	fd = kucomms_client_fd(&pair.b);
	CHECK(fd >= 0 && kucomms_client_fd(&pair.b) == fd);

	/* For messages: armed, one comes, readable; armed again, not. */
	CHECK(kucomms_client_arm(&pair.b, 1, -1) == 0);
	CHECK(!is_readable(fd));
	CHECK(!send_text(&pair.a, "x", 0));
	CHECK(is_readable(fd));
	CHECK(kucomms_client_arm(&pair.b, 1, -1) == 1);
	CHECK(kucomms_client_arm(&pair.b, 0, -1) == 0);
	CHECK(!is_readable(fd));
	expect_text(&pair.b, "x");
	CHECK(kucomms_client_arm(&pair.b, 1, -1) == 0);
	CHECK(!is_readable(fd));

	/* For space: and while it waits, no message wakes it. */
	CHECK(kucomms_client_arm(&pair.b, 0, (ssize_t)most) == 1);
	CHECK(!kucomms_client_send(&pair.b, data, most, 0, 0, 0, 0));
	CHECK(kucomms_client_send(&pair.b, data, 8, 0, 0, 0, 0) == -EAGAIN);
	CHECK(kucomms_client_arm(&pair.b, 0, 8) == 0);
	CHECK(!is_readable(fd));
	CHECK(kucomms_client_arm(&pair.b, 1, 8) == 0);
	CHECK(!send_text(&pair.a, "y", 0));
	CHECK(is_readable(fd));
	CHECK(kucomms_client_arm(&pair.b, 1, 8) == 1);
	CHECK(kucomms_client_arm(&pair.b, 0, 8) == 0);
	CHECK(!is_readable(fd));
	{
		struct kucomms_view view;

		CHECK(!kucomms_client_receive(&pair.a, &view, 0));
		kucomms_client_release(&pair.a, &view);
	}
	CHECK(is_readable(fd));
	CHECK(kucomms_client_arm(&pair.b, 0, 8) == 1);
	expect_text(&pair.b, "y");

	/* For the end. */
	CHECK(kucomms_client_arm(&pair.b, 1, -1) == 0);
	kucomms_client_close(&pair.a);
	CHECK(is_readable(fd));
	CHECK(kucomms_client_arm(&pair.b, 1, -1) == 1);
	CHECK(receive_nothing(&pair.b, 0) == -EPIPE);
	pair_close(&pair);
}

/* ---- a hostile peer ----------------------------------------------------------------- */

static void test_hostile_socket(void)
{
	static struct pair pair;

	pair_open(&pair, 4096, 0);
	CHECK(write(pair.a.socket, "\1\1\1", 3) == 3);
	CHECK(receive_nothing(&pair.b, 10) == -ETIMEDOUT);
	CHECK(write(pair.a.socket, "\1\2\1", 3) == 3);
	CHECK(receive_nothing(&pair.b, -1) == -EPROTO);
	CHECK(receive_nothing(&pair.b, 0) == -EPROTO);
	CHECK(send_text(&pair.b, "x", 0) == -EPROTO);
	CHECK(kucomms_client_arm(&pair.b, 1, -1) == -EPROTO);
	CHECK(pair.b.channel.protocol_errors == 1);
	/* Our end is then no orderly one for the peer. */
	kucomms_client_close(&pair.b);
	CHECK(kucomms_ring_peer_state(&pair.a.channel.rx) ==
	      KUCOMMS_STATE_OPEN);
	CHECK(receive_nothing(&pair.a, -1) == -EPIPE);
	pair_close(&pair);
}

/* Bells without end must not keep a wait from ending. */
static void *ring_on(void *argument)
{
	struct kucomms_client *client = argument;

	while (kucomms_client_ring(client) != -EPIPE)
		;
	return NULL;
}

static void test_hostile_bells(void)
{
	static struct pair pair;
	pthread_t thread;

	pair_open(&pair, 4096, 0);
	CHECK(!pthread_create(&thread, NULL, ring_on, &pair.a));
	CHECK(receive_nothing(&pair.b, 100) == -ETIMEDOUT);
	kucomms_client_close(&pair.b);
	CHECK(!pthread_join(thread, NULL));
	pair_close(&pair);
}

/* A ring full of frames that have to be skipped, and full again, for ever. */
static void *discard_on(void *argument)
{
	struct kucomms_client *client = argument;
	struct kucomms_ring_producer *tx = &client->channel.tx;
	uint64_t at;

	for (at = 0; at < tx->size; at += KUCOMMS_HEADER_SIZE)
		kucomms_ring_discard((struct kucomms_frame *)(tx->data + at), 0);
	do {
		smp_store_release(&tx->own->position, tx->size +
				  smp_load_acquire(&tx->peer->position));
	} while (kucomms_client_ring(client) != -EPIPE);
	return NULL;
}

static void test_hostile_discards(void)
{
	static struct pair pair;
	pthread_t thread;
	int i;

	pair_open(&pair, 1 << 16, 0);
	CHECK(!pthread_create(&thread, NULL, discard_on, &pair.a));
	for (i = 0; i < 100; i++) {
		CHECK(receive_nothing(&pair.b, -1) == -EINTR);
		CHECK(receive_nothing(&pair.b, 0) == -EAGAIN);
	}
	kucomms_client_close(&pair.b);
	CHECK(!pthread_join(thread, NULL));
	pair_close(&pair);
}

/* Far behind what was discarded, a message comes; nobody sleeps before it. */
static void test_many_discarded(void)
{
	static struct pair pair;
	struct kucomms_frame *frame;
	int i, round;

	pair_open(&pair, 1 << 16, 0);
	for (round = 0; round < 2; round++) {
		for (i = 0; i < 1000; i++) {
			CHECK(!kucomms_channel_reserve(&pair.a.channel, 0,
						       &frame, NULL));
			kucomms_channel_discard(&pair.a.channel, frame, 0);
		}
		CHECK(!send_text(&pair.a, "x", 0));
		while (round && receive_nothing(&pair.b, 0) == -EAGAIN)
			CHECK(kucomms_client_arm(&pair.b, 1, -1) == 1);
		expect_text(&pair.b, "x");
	}
	pair_close(&pair);
}

static void test_hostile_rings(void)
{
	static struct pair pair;

	pair_open(&pair, 4096, 0);
	pair.a.channel.tx.own->position = 12345;
	CHECK(receive_nothing(&pair.b, -1) == -EPROTO);
	CHECK(send_text(&pair.b, "x", -1) == -EPROTO);
	pair_close(&pair);
	pair_open(&pair, 4096, 0);
	while (!send_text(&pair.b, "x", 0))
		;
	pair.a.channel.rx.own->position = 12345;
	CHECK(send_text(&pair.b, "x", -1) == -EPROTO);
	CHECK(receive_nothing(&pair.b, -1) == -EPROTO);
	pair_close(&pair);
	pair_open(&pair, 4096, 0);
	pair.a.channel.tx.own->state = 77;
	CHECK(receive_nothing(&pair.b, -1) == -EPIPE);
	pair_close(&pair);
}

/* A raw socket to or from @URL, and a mistake in one field of a record. */
static int raw_connect(void)
{
	int fd, path;

	path = kucomms_directory_open(directory);
	CHECK(path >= 0);
	fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
	CHECK(fd >= 0);
	CHECK(!kucomms_socket_connect(fd, path, "client_test"));
	close(path);
	return fd;
}

struct mistake {
	size_t offset;
	unsigned char value;	/* xor */
	int err;		/* what comes of it */
};

#define AT(field)	__builtin_offsetof(struct kucomms_rendezvous, field)

static const struct mistake mistakes[] = {
	{ AT(magic), 1, -EPROTO },
	{ AT(magic) + 7, 1, -EPROTO },
	{ AT(version), 2, -EPROTONOSUPPORT },
	{ AT(step), 4, -EPROTO },
	{ AT(features), 4, -EPROTONOSUPPORT },
	{ AT(features) + 7, 1, -EPROTONOSUPPORT },
	{ AT(flags), 4, -EPROTO },
	{ AT(flags) + 3, 128, -EPROTO },
	{ AT(hello_length), 65, -EPROTO },
	{ AT(hello_length) + 3, 128, -EPROTO },
	{ AT(pool), 1, -EPROTO },
};

static void *connect_with_mistake(void *argument)
{
	const struct mistake *mistake = argument;
	struct kucomms_rendezvous record, answer;
	int fd = raw_connect();
	ssize_t count;

	kucomms_record_fill(&record, KUCOMMS_STEP_HELLO, 0);
	((unsigned char *)&record)[mistake->offset] ^= mistake->value;
	CHECK(!kucomms_record_send(fd, &record, -1));
	count = recv(fd, &answer, sizeof(answer), MSG_WAITALL);
	if (mistake->err == -EPROTONOSUPPORT) {
		CHECK(count == (ssize_t)sizeof(answer));
		CHECK(answer.step == KUCOMMS_STEP_SETUP);
		CHECK(answer.status == KUCOMMS_REFUSED_VERSION);
	} else {
		CHECK(count == 0);
	}
	close(fd);
	return NULL;
}

static void test_hostile_hello(void)
{
	struct mistake status = { AT(status), 1, -EPROTO };
	struct mistake sealed = { AT(flags), KUCOMMS_SEALED, -EPROTO };
	size_t count = sizeof(mistakes) / sizeof(*mistakes);
	struct kucomms_listener listener;
	struct kucomms_client client;
	pthread_t thread;
	size_t i;

	CHECK(!kucomms_listener_open(&listener, URL, 0));
	for (i = 0; i < count + 2; i++) {
		struct mistake mistake = i < count ? mistakes[i] :
					 i == count ? status : sealed;

		CHECK(!pthread_create(&thread, NULL, connect_with_mistake,
				      &mistake));
		while (listener.dropped == i)
			CHECK(kucomms_listener_accept(&listener, &client, 10)
			      == -ETIMEDOUT);
		CHECK(!pthread_join(thread, NULL));
	}
	CHECK(listener.dropped == i);
	kucomms_listener_close(&listener);
}

/* Part of a record and then silence: dropped, the next one is served. */
static void test_hostile_silence(void)
{
	struct kucomms_rendezvous record;
	static struct pair pair;
	pthread_t thread;
	int fd;

	memset(&pair, 0, sizeof(pair));
	CHECK(!kucomms_listener_open(&pair.listener, URL, 0));
	fd = raw_connect();
	kucomms_record_fill(&record, KUCOMMS_STEP_HELLO, 0);
	CHECK(write(fd, &record, sizeof(record) - 1) ==
	      (ssize_t)sizeof(record) - 1);
	CHECK(!pthread_create(&thread, NULL, connect_b, &pair));
	CHECK(!kucomms_listener_accept(&pair.listener, &pair.a, 20000));
	CHECK(!pthread_join(thread, NULL));
	CHECK(!pair.err && pair.listener.dropped == 1);
	close(fd);
	CHECK(!send_text(&pair.a, "x", 0));
	expect_text(&pair.b, "x");
	pair_close(&pair);
}

/* What a false listener answers. */
struct answer {
	struct kucomms_rendezvous record;
	uint64_t file_size;	/* 0: no file */
	uint32_t side;		/* in the file's geometry */
	int files;		/* how often the file is passed */
	uint64_t asked;		/* ring size, by who connects */
	int socket;
};

static int answer_file(const struct answer *answer)
{
	struct kucomms_geometry geometry;
	int fd = memfd_create("answer", MFD_CLOEXEC);

	CHECK(fd >= 0);
	CHECK(!ftruncate(fd, (off_t)answer->file_size));
	kucomms_geometry_fill(&geometry, answer->side,
			      answer->record.ring_size, 0);
	CHECK(pwrite(fd, &geometry, sizeof(geometry), 0) ==
	      (ssize_t)sizeof(geometry));
	return fd;
}

static void *answer_once(void *argument)
{
	struct answer *answer = argument;
	struct kucomms_rendezvous hello, rest;
	int file = answer->file_size ? answer_file(answer) : -1;
	struct msghdr message;
	struct cmsghdr *header;
	struct iovec part;
	union kucomms_ancillary ancillary;
	int i, fd;

	fd = accept(answer->socket, NULL, NULL);
	CHECK(fd >= 0);
	CHECK(recv(fd, &hello, sizeof(hello), MSG_WAITALL) ==
	      (ssize_t)sizeof(hello));
	CHECK(hello.magic == KUCOMMS_MAGIC && hello.step == KUCOMMS_STEP_HELLO);
	memset(&message, 0, sizeof(message));
	memset(&ancillary, 0, sizeof(ancillary));
	part.iov_base = &answer->record;
	part.iov_len = sizeof(answer->record);
	message.msg_iov = &part;
	message.msg_iovlen = 1;
	if (file >= 0) {
		size_t size = (size_t)answer->files * sizeof(int);

		message.msg_control = ancillary.space;
		message.msg_controllen = CMSG_SPACE(size);
		header = CMSG_FIRSTHDR(&message);
		header->cmsg_level = SOL_SOCKET;
		header->cmsg_type = SCM_RIGHTS;
		header->cmsg_len = CMSG_LEN(size);
		for (i = 0; i < answer->files; i++)
			memcpy(CMSG_DATA(header) + sizeof(int) * (size_t)i,
			       &file, sizeof(int));
	}
	CHECK(sendmsg(fd, &message, 0) == (ssize_t)sizeof(answer->record));
	CHECK(recv(fd, &rest, sizeof(rest), MSG_WAITALL) <= 0);
	close(fd);
	if (file >= 0)
		close(file);
	return NULL;
}

static int count_fds(void)
{
	DIR *fds = opendir("/proc/self/fd");
	int count = 0;

	CHECK(fds);
	while (readdir(fds))
		count++;
	closedir(fds);
	return count;
}

static void expect_answer_refused(struct kucomms_listener *listener,
				  struct answer *answer, int err)
{
	struct kucomms_client client;
	pthread_t thread;
	int before = count_fds();

	answer->socket = listener->socket;
	CHECK(!pthread_create(&thread, NULL, answer_once, answer));
	CHECK(kucomms_connect(&client, URL, answer->asked, 20000) == err);
	CHECK(!pthread_join(thread, NULL));
	CHECK(send_text(&client, "x", 0) == -EBADF);
	CHECK(count_fds() == before);
}

static void test_hostile_setup(void)
{
	static const struct { uint32_t status; int err; } refusals[] = {
		{ KUCOMMS_REFUSED_BUSY, -EBUSY },
		{ KUCOMMS_REFUSED_VERSION, -EPROTONOSUPPORT },
		{ KUCOMMS_REFUSED_MEMORY, -ENOSPC },
		{ KUCOMMS_REFUSED_USER, -EPERM },
		{ 99, -EPROTO },
	};
	struct kucomms_listener listener;
	struct answer good, bad;
	size_t i;

	CHECK(!kucomms_listener_open(&listener, URL, 0));
	/* Only for the false listener to wait in accept(). */
	CHECK(!fcntl(listener.socket, F_SETFL, 0));
	memset(&good, 0, sizeof(good));
	kucomms_record_fill(&good.record, KUCOMMS_STEP_SETUP, 65536);
	good.record.features = 0;
	good.file_size = 2 * kucomms_side_size(65536);
	good.files = 1;

	for (i = 0; i < sizeof(mistakes) / sizeof(*mistakes); i++) {
		bad = good;
		((unsigned char *)&bad.record)[mistakes[i].offset] ^=
			mistakes[i].value;
		expect_answer_refused(&listener, &bad, mistakes[i].err);
	}
	for (i = 0; i < sizeof(refusals) / sizeof(*refusals); i++) {
		bad = good;
		bad.record.status = refusals[i].status;
		/* With a file it is no proper refusal. */
		expect_answer_refused(&listener, &bad, -EPROTO);
		bad.file_size = 0;
		expect_answer_refused(&listener, &bad, refusals[i].err);
	}
	bad = good;
	bad.file_size = 0;
	expect_answer_refused(&listener, &bad, -EPROTO);
	bad = good;
	bad.files = 2;
	expect_answer_refused(&listener, &bad, -EPROTO);
	bad.files = 4;
	expect_answer_refused(&listener, &bad, -EPROTO);
	bad = good;
	bad.record.flags = KUCOMMS_SEALED;
	expect_answer_refused(&listener, &bad, -EPROTONOSUPPORT);
	bad = good;
	bad.side = 1;
	expect_answer_refused(&listener, &bad, -EPROTO);
	/* Turns are announced, the memory says otherwise. */
	bad = good;
	bad.record.features = KUCOMMS_FEATURE_TURNS;
	expect_answer_refused(&listener, &bad, -EPROTO);
	/* The memory is too small, too large; the ring is no ring. */
	bad = good;
	bad.file_size--;
	expect_answer_refused(&listener, &bad, -EPROTO);
	bad = good;
	bad.file_size++;
	expect_answer_refused(&listener, &bad, -EPROTO);
	bad = good;
	bad.record.ring_size = 0;
	expect_answer_refused(&listener, &bad, -EPROTO);
	bad.record.ring_size = 65537;
	expect_answer_refused(&listener, &bad, -EPROTO);
	bad.record.ring_size = UINT64_MAX;
	expect_answer_refused(&listener, &bad, -EPROTO);
	bad.record.ring_size = 1ULL << 63;
	expect_answer_refused(&listener, &bad, -EPROTO);
	/* The ring is larger than was asked for. */
	bad = good;
	bad.asked = 32768;
	expect_answer_refused(&listener, &bad, -EPROTO);
	bad.asked = 1;
	expect_answer_refused(&listener, &bad, -EPROTO);
	kucomms_listener_close(&listener);
}

/* ---- turns ------------------------------------------------------------------- */

static void turns_open(struct pair *pair)
{
	pthread_t thread;

	memset(pair, 0, sizeof(*pair));
	CHECK(!kucomms_listener_open(&pair->listener, URL, 0));
	pair->listener.features = KUCOMMS_FEATURE_TURNS;
	CHECK(!pthread_create(&thread, NULL, connect_b, pair));
	CHECK(!kucomms_listener_accept(&pair->listener, &pair->a, 5000));
	CHECK(!pthread_join(thread, NULL));
	CHECK(!pair->err);
	CHECK(kucomms_client_has_turns(&pair->a));
	CHECK(kucomms_client_has_turns(&pair->b));
	CHECK(!kucomms_client_has_turn(&pair->a));
	CHECK(kucomms_client_has_turn(&pair->b));
}

enum { ROUNDS = 1000 };

/* Adds one to each number, and answers before it lets go of it; at last a token. */
static void *count_on(void *argument)
{
	struct kucomms_client *client = argument;
	struct kucomms_view view;
	uint64_t number;
	int round;

	for (round = 0; round < ROUNDS; round++) {
		CHECK(!kucomms_client_has_turn(client));
		CHECK(!kucomms_client_receive(client, &view, 20000));
		CHECK(kucomms_client_has_turn(client));
		memcpy(&number, view.data, sizeof(number));
		number++;
		CHECK(!kucomms_client_reply(client, &view, &number,
					    sizeof(number), 20000));
		CHECK(!kucomms_client_has_turn(client));
		CHECK(send_text(client, "again", 0) == -EPERM);
		/* The same one, and no turn with it. */
		CHECK(!kucomms_client_receive(client, &view, 0));
		CHECK(!kucomms_client_has_turn(client));
		kucomms_client_release(client, &view);
	}
	CHECK(!kucomms_client_receive(client, &view, 20000));
	CHECK(view.flags == KUCOMMS_FLAG_TOKEN && !view.length);
	kucomms_client_release(client, &view);
	CHECK(!kucomms_client_pass_turn(client, 0));
	return NULL;
}

static void test_turns(void)
{
	struct kucomms_view view;
	static struct pair pair;
	uint64_t number = 0;
	pthread_t thread;
	int round;

	turns_open(&pair);
	CHECK(send_text(&pair.a, "first", -1) == -EPERM);
	CHECK(kucomms_client_pass_turn(&pair.a, -1) == -EPERM);
	CHECK(!pthread_create(&thread, NULL, count_on, &pair.a));
	for (round = 0; round < ROUNDS; round++) {
		CHECK(!kucomms_client_send(&pair.b, &number, sizeof(number), 0,
					   0, 0, 20000));
		/* Not before it is received, also when it has long arrived. */
		while (!kucomms_channel_rx_avail(&pair.b.channel))
			sched_yield();
		CHECK(!kucomms_client_has_turn(&pair.b));
		CHECK(send_text(&pair.b, "again", -1) == -EPERM);
		CHECK(!kucomms_client_receive(&pair.b, &view, 20000));
		CHECK(kucomms_client_has_turn(&pair.b));
		memcpy(&number, view.data, sizeof(number));
		kucomms_client_release(&pair.b, &view);
		CHECK(kucomms_client_has_turn(&pair.b));
		CHECK(number == (uint64_t)round + 1);
	}
	CHECK(!kucomms_client_pass_turn(&pair.b, 0));
	CHECK(!kucomms_client_receive(&pair.b, &view, 20000));
	CHECK(view.flags == KUCOMMS_FLAG_TOKEN);
	kucomms_client_release(&pair.b, &view);
	CHECK(!pthread_join(thread, NULL));
	CHECK(kucomms_client_has_turn(&pair.b));
	pair_close(&pair);
}

/* Messages that are held, and none at all where there are no turns. */
static void test_turns_held(void)
{
	struct kucomms_pin pins[3];
	struct kucomms_view view;
	static struct pair pair;
	int i;

	turns_open(&pair);
	for (i = 0; i < 3; i++) {
		CHECK(!send_text(&pair.b, "held", 0));
		CHECK(!kucomms_client_receive(&pair.a, &view, 0));
		kucomms_client_hold(&pair.a, &view, &pins[i]);
		CHECK(kucomms_client_has_turn(&pair.a));
		CHECK(!kucomms_client_pass_turn(&pair.a, 0));
		CHECK(!kucomms_client_receive(&pair.b, &view, 0));
		kucomms_client_release(&pair.b, &view);
	}
	for (i = 0; i < 3; i++)
		kucomms_client_let_go(&pair.a, &pins[i]);
	/* It dies with the turn: an end as any other. */
	kucomms_client_close(&pair.b);
	CHECK(receive_nothing(&pair.a, 5000) == -EPIPE);
	CHECK(send_text(&pair.a, "x", 0) == -EPIPE);
	CHECK(kucomms_client_pass_turn(&pair.b, 0) == -EBADF);
	pair_close(&pair);

	pair_open(&pair, 0, 0);
	CHECK(!kucomms_client_has_turns(&pair.a));
	CHECK(kucomms_client_has_turn(&pair.a));
	CHECK(kucomms_client_has_turn(&pair.b));
	CHECK(kucomms_client_pass_turn(&pair.b, 0) == -EINVAL);
	CHECK(!send_text(&pair.b, "one", 0) && !send_text(&pair.b, "two", 0));
	pair_close(&pair);
}

/* A peer of a kind that does not know turns is told that this is no use. */
static void test_turns_unknown(void)
{
	struct kucomms_rendezvous record;
	struct kucomms_listener listener;
	struct kucomms_client client;
	int fd;

	CHECK(!kucomms_listener_open(&listener, URL, 0));
	listener.features = KUCOMMS_FEATURE_TURNS;
	fd = raw_connect();
	kucomms_record_fill(&record, KUCOMMS_STEP_HELLO, 0);
	record.features = 0;
	CHECK(write(fd, &record, sizeof(record)) == (ssize_t)sizeof(record));
	CHECK(kucomms_listener_accept(&listener, &client, 0) == -EAGAIN);
	CHECK(listener.dropped == 1);
	CHECK(recv(fd, &record, sizeof(record), MSG_WAITALL) ==
	      (ssize_t)sizeof(record));
	CHECK(record.status == KUCOMMS_REFUSED_VERSION);
	CHECK(record.features == KUCOMMS_CLIENT_FEATURES);
	close(fd);
	kucomms_listener_close(&listener);
}

/* Pools are not for C programs: said to who asks, and no peer is to blame. */
static void test_features_that_are_not_ours(void)
{
	struct kucomms_rendezvous record;
	struct kucomms_listener listener;
	struct kucomms_client client;
	int fd;

	CHECK(!kucomms_listener_open(&listener, URL, 0));
	fd = raw_connect();
	kucomms_record_fill(&record, KUCOMMS_STEP_HELLO, 0);
	record.features = KUCOMMS_FEATURES;
	CHECK(write(fd, &record, sizeof(record)) == (ssize_t)sizeof(record));
	listener.features = KUCOMMS_FEATURE_POOLS;
	CHECK(kucomms_listener_accept(&listener, &client, 0) == -EINVAL);
	listener.features = KUCOMMS_CLIENT_FEATURES | 1ULL << 40;
	CHECK(kucomms_listener_accept(&listener, &client, 0) == -EINVAL);
	CHECK(recv(fd, &record, sizeof(record), MSG_DONTWAIT) < 0);
	CHECK(errno == EAGAIN);
	CHECK(listener.dropped == 0);
	close(fd);
	kucomms_listener_close(&listener);
}

/* It sends when it likes: the link is of no more use. */
static void test_hostile_turns(void)
{
	struct kucomms_view view;
	static struct pair pair;

	turns_open(&pair);
	pair.b.channel.turn = KUCOMMS_TURN_ANY;
	CHECK(!send_text(&pair.b, "one", 0) && !send_text(&pair.b, "two", 0));
	CHECK(!kucomms_client_receive(&pair.a, &view, 0));
	kucomms_client_release(&pair.a, &view);
	CHECK(receive_nothing(&pair.a, 0) == -EPROTO);
	CHECK(send_text(&pair.a, "x", 0) == -EPROTO);
	pair_close(&pair);
}

static const struct {
	const char *name;
	void (*run)(void);
} tests[] = {
	{ "urls", test_urls },
	{ "no_device", test_no_device },
	{ "nobody", test_nobody },
	{ "listener_says_nothing", test_listener_says_nothing },
	{ "name_is_taken", test_name_is_taken },
	{ "directory_is_locked", test_directory_is_locked },
	{ "directory_of_others", test_directory_of_others },
	{ "messages", test_messages },
	{ "held", test_held },
	{ "ring_sizes", test_ring_sizes },
	{ "full", test_full },
	{ "waiting", test_waiting },
	{ "close", test_close },
	{ "death", test_death },
	{ "death_with_descriptors_held", test_death_with_descriptors_held },
	{ "death_seen_by_sender", test_death_seen_by_sender },
	{ "close_wakes", test_close_wakes },
	{ "discarded_space_comes_back", test_discarded_space_comes_back },
	{ "signal", test_signal },
	{ "arm", test_arm },
	{ "hostile_socket", test_hostile_socket },
	{ "hostile_bells", test_hostile_bells },
	{ "hostile_rings", test_hostile_rings },
	{ "hostile_discards", test_hostile_discards },
	{ "many_discarded", test_many_discarded },
	{ "hostile_hello", test_hostile_hello },
	{ "hostile_silence", test_hostile_silence },
	{ "hostile_setup", test_hostile_setup },
	{ "turns", test_turns },
	{ "turns_held", test_turns_held },
	{ "turns_unknown", test_turns_unknown },
	{ "features_that_are_not_ours", test_features_that_are_not_ours },
	{ "hostile_turns", test_hostile_turns },
};

int main(void)
{
	int before;
	size_t i;

	CHECK(!kucomms_directory_path(directory, sizeof(directory)));
	for (i = 0; i < sizeof(tests) / sizeof(*tests); i++) {
		before = count_fds();
		tests[i].run();
		CHECK(count_fds() == before);
		CHECK(access(directory, F_OK) && errno == ENOENT);
		printf("ok %s\n", tests[i].name);
	}
	return 0;
}
