/* SPDX-License-Identifier: GPL-2.0-only OR MIT */
/*
 * A line of the soak in C, for the great numbers. Between processes it goes one
 * way: the peer sends, the hub checks every byte. With the kernel, the module
 * sends everything back, and the peer checks that. Content and ledger are those
 * of content.py and ledger.py.
 *
 *	native hub|peer|kernel URL CONTENT LEDGER ERRORS LINE SEED
 *
 * For the kernel the URL is the path of the device.
 */
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>

#include <kucomms/client.h>

#define OFFSETS		65521
#define SIZES		8191
#define RING_SIZE	(1 << 18)
#define PATIENCE_MS	60000
#define LOOK_MS		200	/* how often the hub looks whether to stop */
#define LOOK_EVERY	1024	/* and the peer, in messages */

enum { ENDS_PEER, ENDS_HUB, ENDS_KILL };
enum { SESSION, ENDS, PEER_CHECKED, PEER_WRONG, PEER_JUDGED };
enum { HUB_CHECKED = 8, HUB_WRONG, HUB_JUDGED, DEATHS, LATEST };
enum { ROW = 96, RECENT = 16, SENT = 16, OWNER = 32, ENDED = 64 };

static const uint32_t *sizes;
static const unsigned char *pattern;
static volatile uint64_t *run, *row;
static const char *errors;
static uint64_t line;
static pid_t parent;

static int stopping(void)
{
	return *run || getppid() != parent;
}

/* Any number that seed and session determine. */
static uint64_t mix(uint64_t value)
{
	value = (value ^ (value >> 30)) * 0xbf58476d1ce4e5b9ULL;
	value = (value ^ (value >> 27)) * 0x94d049bb133111ebULL;
	return value ^ (value >> 31);
}

static uint64_t session_key(uint64_t session)
{
	return (line * 1000003 + session) * 2;
}

static const unsigned char *content(uint64_t key, uint64_t number, uint32_t *size)
{
	*size = sizes[(number + key) % SIZES];
	return pattern + (number * 40503 + key * 2654435761ULL) % OFFSETS;
}

__attribute__((format(printf, 2, 3)))
static void wrong(int word, const char *format, ...)
{
	FILE *file = fopen(errors, "a");
	va_list arguments;

	row[word]++;
	if (!file)
		return;
	fprintf(file, "line %llu, C: ", (unsigned long long)line);
	va_start(arguments, format);
	vfprintf(file, format, arguments);
	va_end(arguments);
	fputc('\n', file);
	fclose(file);
}

static void *map(const char *path, int protection)
{
	int file = open(path, protection & PROT_WRITE ? O_RDWR : O_RDONLY);
	struct stat status;
	void *memory;

	if (file < 0 || fstat(file, &status))
		return NULL;
	memory = mmap(NULL, (size_t)status.st_size, protection, MAP_SHARED, file, 0);
	close(file);
	return memory == MAP_FAILED ? NULL : memory;
}

/* ---- the peer ----------------------------------------------------------- */

static int send_session(struct kucomms_client *link, uint64_t session, uint64_t count)
{
	uint64_t begin[2] = { session, row[ENDS] };
	uint64_t key = session_key(session), number;
	volatile uint64_t *sent = &row[SENT + session % RECENT];
	const unsigned char *data;
	uint32_t size;
	int err;

	err = kucomms_client_send(link, begin, sizeof(begin), 0, 0, 0, PATIENCE_MS);
	for (number = 0; !err && number < count; number++) {
		if (number % LOOK_EVERY == 0 && stopping())
			break;
		data = content(key, number, &size);
		err = kucomms_client_send(link, data, size, key, number, key + number,
					  PATIENCE_MS);
		if (!err)
			*sent = number + 1;
	}
	return err;
}

/* Note that one begins, and how it is to end. Return: how many messages it has. */
static uint64_t begin_session(uint64_t session, uint64_t seed, uint64_t mask)
{
	uint64_t drawn = mix(seed + line * 1000003 + session);

	row[SENT + session % RECENT] = 0;
	row[ENDED + session % RECENT] = 0;
	row[OWNER + session % RECENT] = session;
	row[ENDS] = drawn & 1 ? ENDS_KILL : ENDS_PEER;
	row[SESSION] = session;
	return drawn & 1 ? UINT64_MAX : drawn >> 32 & mask;
}

static int peer(const char *url, uint64_t seed)
{
	struct kucomms_client link;
	uint64_t session, count;
	int err;

	while (!stopping()) {
		session = row[SESSION] + 1;
		count = begin_session(session, seed, 0x1fffff);
		err = kucomms_connect(&link, url, RING_SIZE, PATIENCE_MS);
		if (!err)
			err = send_session(&link, session, count);
		kucomms_client_close(&link);
		row[ENDED + session % RECENT] = (uint64_t)kucomms_now(CLOCK_MONOTONIC);
		if (err) {
			wrong(PEER_WRONG, "the peer: %s", strerror(-err));
			return 1;
		}
	}
	return 0;
}

/* ---- the hub ------------------------------------------------------------ */

/* In order means: exactly this number and no other. */
static int check(const struct kucomms_view *message, uint64_t key, uint64_t number)
{
	const unsigned char *data;
	uint32_t size;

	data = content(key, number, &size);
	return message->type == key && message->id == number &&
	       message->user_value == key + number && message->length == size &&
	       !memcmp(message->data, data, size);
}

static void judge(uint64_t session, uint64_t ends, uint64_t received, int err, int closed)
{
	uint64_t sent = row[SENT + session % RECENT];
	uint64_t ended = row[ENDED + session % RECENT];
	uint64_t now = (uint64_t)kucomms_now(CLOCK_MONOTONIC);

	if (ended && now - ended > row[LATEST] && now > ended)
		row[LATEST] = now - ended;
	if (row[OWNER + session % RECENT] != session)
		wrong(HUB_WRONG, "session %llu was judged too late",
		      (unsigned long long)session);
	if (err != -EPIPE)
		wrong(HUB_WRONG, "session %llu ended with: %s",
		      (unsigned long long)session, strerror(-err));
	if (closed != (ends == ENDS_PEER) && !(closed && stopping()))
		wrong(HUB_WRONG, "session %llu: %s", (unsigned long long)session,
		      closed ? "it was closed" : "it was not closed in order");
	if (closed ? received != sent : received < sent || received > sent + 1)
		wrong(HUB_WRONG, "session %llu: %llu messages sent, %llu arrived",
		      (unsigned long long)session, (unsigned long long)sent,
		      (unsigned long long)received);
	if (!closed)
		row[DEATHS]++;
	row[HUB_JUDGED]++;
}

static void serve(struct kucomms_client *link)
{
	uint64_t begin[2], key, checked = row[HUB_CHECKED], number = 0;
	struct kucomms_view message;
	int err;

	err = kucomms_client_receive(link, &message, PATIENCE_MS);
	if (err == -EPIPE)
		return;		/* killed before it said anything */
	if (err || message.length != sizeof(begin)) {
		wrong(HUB_WRONG, "a session's begin: %s", err ? strerror(-err) : "length");
		return;
	}
	memcpy(begin, message.data, sizeof(begin));
	kucomms_client_release(link, &message);
	key = session_key(begin[0]);
	for (;; number++) {
		err = kucomms_client_receive(link, &message, PATIENCE_MS);
		if (err)
			break;
		if (!check(&message, key, number)) {
			wrong(HUB_WRONG, "message %llu: key %llu, number %llu, %u bytes",
			      (unsigned long long)number, (unsigned long long)message.type,
			      (unsigned long long)message.id, message.length);
			return;
		}
		kucomms_client_release(link, &message);
		row[HUB_CHECKED] = ++checked;
	}
	judge(begin[0], begin[1], number, err,
	      kucomms_ring_peer_state(&link->channel.rx) == KUCOMMS_STATE_CLOSED);
}

static int hub(const char *url)
{
	struct kucomms_listener listener;
	struct kucomms_client link;
	int err;

	err = kucomms_listener_open(&listener, url, RING_SIZE);
	if (err) {
		wrong(HUB_WRONG, "%s: %s", url, strerror(-err));
		return 1;
	}
	while (*run < 2 && getppid() == parent) {
		err = kucomms_listener_accept(&listener, &link, LOOK_MS);
		if (!err)
			serve(&link);
		else if (err != -ETIMEDOUT)
			wrong(HUB_WRONG, "accept: %s", strerror(-err));
		kucomms_client_close(&link);
	}
	kucomms_listener_close(&listener);
	return 0;
}

/* ---- with the kernel ---------------------------------------------------- */

static int device_open(const char *path, struct kucomms_channel *channel)
{
	struct kucomms_setup setup = {
		.version = KUCOMMS_ABI_VERSION,
		.features = 0,
		.ring_size = RING_SIZE,
	};
	int file = open(path, O_RDWR | O_CLOEXEC), err;

	if (file < 0)
		return -errno;
	err = ioctl(file, KUCOMMS_IOC_SETUP, &setup) ? -errno : 0;
	if (!err)
		err = kucomms_channel_init(channel, 1, setup.ring_size, setup.features, file,
					   (uint64_t)setup.side_offset[1]);
	if (!err) {
		err = kucomms_channel_attach(channel, file, (uint64_t)setup.side_offset[0]);
		if (err)
			kucomms_channel_destroy(channel);
	}
	if (!err)
		return file;
	close(file);
	return err;
}

static int kick(int file)
{
	return ioctl(file, KUCOMMS_IOC_KICK) ? -errno : 0;
}

/* Send what there is room for, at most until @last. Return: 0 or -errno. */
static int send_some(int file, struct kucomms_channel *channel, uint64_t key, uint64_t *number,
		     uint64_t last)
{
	const unsigned char *data;
	uint32_t size;
	int err;

	for (; *number < last; ++*number) {
		data = content(key, *number, &size);
		err = kucomms_channel_send(channel, data, size, 0, key, *number, key + *number);
		if (err == 1)
			err = kick(file);
		if (err)
			return err == -EAGAIN ? 0 : err;
	}
	return 0;
}

/* Check what has come. Return: 0 or -errno, -EBADMSG when it is not what it must be. */
static int check_some(int file, struct kucomms_channel *channel, uint64_t key, uint64_t *number)
{
	struct kucomms_view message;
	int err;

	for (;; ++*number) {
		err = kucomms_channel_peek(channel, &message);
		if (err)
			return err == -EAGAIN ? 0 : err;
		if (!check(&message, key, *number))
			return -EBADMSG;
		kucomms_channel_advance(channel, &message);
		err = kucomms_channel_release(channel) ? kick(file) : 0;
		if (err)
			return err;
		row[PEER_CHECKED]++;
	}
}

/* Until there is something to read, or room for the next. Return: 0 or -errno. */
static int wait_kernel(int file, struct kucomms_channel *channel, uint32_t size, int sending)
{
	struct kucomms_wait wait = {
		.events = KUCOMMS_WAIT_DATA | (sending ? KUCOMMS_WAIT_SPACE : 0),
		.timeout_ns = PATIENCE_MS * 1000000LL,
	};
	int err;

	if (kucomms_channel_park_rx(channel))
		return 0;
	if (sending) {
		err = kucomms_channel_park_tx(channel, size);
		if (err == 1)
			err = kick(file);
		if (err)
			return err == -EAGAIN ? 0 : err;
	}
	return ioctl(file, KUCOMMS_IOC_WAIT, &wait) ? -errno : 0;
}

static int kernel_session(int file, struct kucomms_channel *channel, uint64_t session,
			  uint64_t count)
{
	uint64_t key = session_key(session), sent = 0, received = 0, before;
	uint32_t size;
	int err = 0;

	while (!err && (received < sent || sent < count)) {
		if (stopping())
			count = sent;
		before = sent + received;
		err = send_some(file, channel, key, &sent,
				count - sent < LOOK_EVERY ? count : sent + LOOK_EVERY);
		if (!err)
			err = check_some(file, channel, key, &received);
		if (err || before != sent + received)
			continue;
		content(key, sent, &size);
		err = wait_kernel(file, channel, size, sent < count);
	}
	if (!err)
		row[PEER_JUDGED]++;
	else
		wrong(PEER_WRONG, "session %llu: %llu sent, %llu came back, then: %s",
		      (unsigned long long)session, (unsigned long long)sent,
		      (unsigned long long)received, strerror(-err));
	return err;
}

static int kernel(const char *path, uint64_t seed)
{
	struct kucomms_channel channel;
	uint64_t session, count;
	int err = 0, file;

	while (!err && !stopping()) {
		session = row[SESSION] + 1;
		count = begin_session(session, seed, 0x1ffff);
		file = device_open(path, &channel);
		if (file < 0) {
			wrong(PEER_WRONG, "%s: %s", path, strerror(-file));
			return 1;
		}
		err = kernel_session(file, &channel, session, count);
		kucomms_channel_close(&channel, KUCOMMS_STATE_CLOSED);
		kick(file);
		kucomms_channel_destroy(&channel);
		close(file);
	}
	return !!err;
}

int main(int argc, char **argv)
{
	unsigned char *memory;
	uint64_t *words;

	if (argc != 8) {
		fprintf(stderr, "usage: %s hub|peer|kernel URL CONTENT LEDGER ERRORS LINE SEED\n",
			argv[0]);
		return 2;
	}
	parent = getppid();
	signal(SIGINT, SIG_IGN);	/* who started us says when */
	memory = map(argv[3], PROT_READ);
	words = map(argv[4], PROT_READ | PROT_WRITE);
	if (!memory || !words) {
		perror(argv[3]);
		return 1;
	}
	errors = argv[5];
	line = strtoull(argv[6], NULL, 10);
	sizes = (const uint32_t *)memory;
	pattern = memory + SIZES * sizeof(*sizes);
	run = words;
	row = words + line * ROW;
	if (!strcmp(argv[1], "hub"))
		return hub(argv[2]);
	if (!strcmp(argv[1], "kernel"))
		return kernel(argv[2], strtoull(argv[7], NULL, 10));
	return peer(argv[2], strtoull(argv[7], NULL, 10));
}
