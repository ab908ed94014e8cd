/* SPDX-License-Identifier: GPL-2.0-only OR MIT */
/*
 * Either end of a shm:// link, and the user's end of one to a kernel module, for
 * programs in C and C++. Header only:
 *
 *	cc -I$(python -c 'import kucomms; print(kucomms.get_include())') ...
 *
 * (and -lrt where glibc is older than 2.34). One side listens, the other
 * connects; from then on both can do the same. kernel://NAME is connected to as
 * shm://NAME is, and kernel://NAME/3 is one of the channels that the kernel
 * endpoint has numbered:
 *
 *	struct kucomms_client link;
 *	struct kucomms_view message;
 *	int err;
 *
 *	err = kucomms_connect(&link, "shm://sensor", 0, 5000);
 *	if (!err)
 *		err = kucomms_client_send(&link, "hello", 5, 1, 7, 0, -1);
 *	if (!err)
 *		err = kucomms_client_receive(&link, &message, -1);
 *	if (!err) {
 *		... message.data, message.length, message.id ...
 *		kucomms_client_release(&link, &message);
 *	}
 *	kucomms_client_close(&link);
 *
 * Functions return 0 or more, or a negative errno:
 *
 *	-EAGAIN		timeout 0, and it cannot be done now
 *	-ETIMEDOUT	not within the timeout
 *	-EINTR		a signal handler ran while waiting, or the peer has us
 *			skip without end what it discards; call again
 *	-EPIPE		the peer is gone, and all that it sent was received
 *	-EMSGSIZE	the message can never fit
 *	-EPROTO		the peer broke the rules; the link is of no more use
 *	-EPROTONOSUPPORT  the peer speaks another version
 *	-EBUSY		the listener takes no more links
 *	-ECHRNG		the kernel endpoint has no channel of this number (yet)
 *	-ESHUTDOWN	as -EPIPE: the kernel module goes away
 *	-EPERM		the peer, or the directory of sockets, is another user's; or
 *			of a send: it is the peer's turn, see below
 *	-EADDRINUSE	somebody else listens under this name, or has the channel
 *	-EINVAL		not shm://NAME, kernel://NAME or kernel://NAME/NUMBER,
 *			with a NAME of [A-Za-z0-9_]{1,48}
 *	-EBADF		the link was closed by this side
 *
 * Timeouts are in milliseconds, -1 waits for ever, 0 never waits.
 *
 * A link belongs to one thread at a time, and only to the process that made
 * it: its memory is not there in a forked child, which must not touch it. The
 * struct must not be copied or moved while the link is open.
 *
 * A listener, also a kernel endpoint, can ask for turns. Then only one side may
 * send, and passes the turn with its message, or with kucomms_client_pass_turn().
 * Who connects begins. The turn comes with the message that is received, and not
 * before; sends out of turn fail with -EPERM.
 *
 * Two sides that both send and never receive fill both rings and then wait for
 * each other: give sends a timeout, or receive in between.
 */
#ifndef _KUCOMMS_CLIENT_H
#define _KUCOMMS_CLIENT_H

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/file.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#include <kucomms/channel.h>
#include <kucomms/rendezvous.h>

#define KUCOMMS_RING_DEFAULT	(1ULL << 20)	/* bytes per direction */
#define KUCOMMS_RING_LIMIT	(1ULL << 26)	/* a connector gets no more */
#define KUCOMMS_HANDSHAKE_MS	1000		/* for a peer that is there */
#define KUCOMMS_LIVENESS_MS	50		/* a death is seen within this */
#define KUCOMMS_LOCK_MS		5000		/* for others to take a name */
#define KUCOMMS_UNLISTEN_MS	20		/* the same, for who gives one up */

/* C programs do not know pools: messages to and from them hand over no buffers. */
#define KUCOMMS_CLIENT_FEATURES	(KUCOMMS_FEATURES & ~KUCOMMS_FEATURE_POOLS)

/* Older C libraries lack these. */
#ifdef SO_PEERPIDFD
#define KUCOMMS_SO_PEERPIDFD	SO_PEERPIDFD
#else
#define KUCOMMS_SO_PEERPIDFD	77
#endif
#ifdef SYS_pidfd_open
#define KUCOMMS_SYS_PIDFD_OPEN	SYS_pidfd_open
#else
#define KUCOMMS_SYS_PIDFD_OPEN	434
#endif

/**
 * struct kucomms_client - one end of a link
 * @channel: the rings
 * @socket: the doorbell, and by its end the sign that the peer is gone
 * @pidfd: the peer's process, or -1 where the kernel has no pidfd
 * @device: instead of both, of a link to a kernel module; else -1
 * @epoll: all of them, for kucomms_client_fd(); -1 until asked for
 * @error: what every further call returns, or 0
 * @gone: the peer is; what it committed before may still be received
 * @unrung: a doorbell found no memory, and is rung again with the next call
 * @looked: when we last looked whether it is, nanoseconds
 * @peer_pid: the peer's process id, as it was when the link was made
 * @peer_uid: the peer's user, the same as ours
 * @number: of the kernel endpoint's channel, -1 when it has none
 */
struct kucomms_client {
	struct kucomms_channel channel;
	int socket;
	int pidfd;
	int device;
	int epoll;
	int error;
	int gone;
	int unrung;
	int64_t looked;
	pid_t peer_pid;
	uid_t peer_uid;
	int64_t number;
};

/**
 * struct kucomms_listener - a name under which links are accepted
 * @socket: readable when somebody connects
 * @directory: where the socket is
 * @device: with @inode: how to know that the socket is still ours
 * @inode: see @device
 * @ring_size: for a connector that asks for none; may be changed
 * @max_ring_size: the most that a connector gets; may be changed
 * @features: KUCOMMS_FEATURE_TURNS for links with turns, or 0; may be changed
 * @dropped: connectors that were turned away for breaking the rules
 * @name: of the socket in the directory
 */
struct kucomms_listener {
	int socket;
	int directory;
	dev_t device;
	ino_t inode;
	uint64_t ring_size;
	uint64_t max_ring_size;
	uint64_t features;
	uint64_t dropped;
	char name[KUCOMMS_NAME_MAX + 1];
};

/* struct ucred, which C libraries show to _GNU_SOURCE only. */
struct kucomms_credentials {
	int32_t pid;
	uint32_t uid;
	uint32_t gid;
};

/* ---- time --------------------------------------------------------------- */

static inline int64_t kucomms_now(clockid_t clock)
{
	struct timespec now;

	clock_gettime(clock, &now);
	return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

/* The time at which a wait that begins now ends. */
static inline int64_t kucomms_deadline(int timeout_ms)
{
	if (timeout_ms < 0)
		return INT64_MAX;
	if (!timeout_ms)
		return 0;
	return kucomms_now(CLOCK_MONOTONIC) + (int64_t)timeout_ms * 1000000;
}

/* What is left until @end, for poll(). */
static inline int kucomms_poll_time(int64_t end)
{
	int64_t left;

	if (end == INT64_MAX)
		return -1;
	if (!end)
		return 0;
	left = end - kucomms_now(CLOCK_MONOTONIC);
	if (left <= 0)
		return 0;
	left = (left + 999999) / 1000000;
	return left > INT_MAX ? INT_MAX : (int)left;
}

/* ---- names, the directory of sockets ------------------------------------ */

/*
 * The NAME of a URL of this scheme, copied, and what follows it. Return: 0,
 * -EINVAL.
 */
static inline int kucomms_url_split(const char *url, const char *scheme,
				    char *name, const char **rest)
{
	static const char allowed[] =
		"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_";
	size_t length;

	if (strncmp(url, scheme, strlen(scheme)))
		return -EINVAL;
	url += strlen(scheme);
	length = strspn(url, allowed);
	if (!length || length > KUCOMMS_NAME_MAX)
		return -EINVAL;
	memcpy(name, url, length);
	name[length] = '\0';
	*rest = url + length;
	return 0;
}

/* The NAME of shm://NAME, copied. Return: 0 or -EINVAL. */
static inline int kucomms_url_name(const char *url, char *name)
{
	const char *rest;
	int err = kucomms_url_split(url, "shm://", name, &rest);

	return err ? err : *rest ? -EINVAL : 0;
}

/*
 * The NAME and the number of kernel://NAME/NUMBER; without that it is -1. Return:
 * 0 or -EINVAL.
 */
static inline int kucomms_url_channel(const char *url, char *name,
				      int64_t *number)
{
	const char *rest;
	int err = kucomms_url_split(url, "kernel://", name, &rest);

	*number = -1;
	if (err || !*rest)
		return err;
	/* As the kernel's numbers are written, and in no other way. */
	if (*rest++ != '/' || !*rest || (*rest == '0' && rest[1]))
		return -EINVAL;
	for (*number = 0; *rest; rest++) {
		if (*rest < '0' || *rest > '9')
			return -EINVAL;
		*number = 10 * *number + (*rest - '0');
		if (*number > (int64_t)UINT32_MAX)
			return -EINVAL;
	}
	return 0;
}

static inline int kucomms_directory_path(char *path, size_t size)
{
	const char *base = getenv("XDG_RUNTIME_DIR");
	int length;

	if (base && base[0] == '/')
		length = snprintf(path, size, "%s/kucomms", base);
	else
		length = snprintf(path, size, "/tmp/kucomms-%u",
				  (unsigned int)geteuid());
	return length < 0 || (size_t)length >= size ? -ENAMETOOLONG : 0;
}

/*
 * Open the directory, which must be ours alone: /tmp is everybody's. Return: a
 * descriptor, -EPERM or -errno.
 */
static inline int kucomms_directory_open(const char *path)
{
	struct stat status;
	int err, fd;

	fd = open(path, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
	if (fd < 0)
		return -errno;
	err = fstat(fd, &status) ? -errno : 0;
	if (!err && (status.st_uid != geteuid() || status.st_mode & 077))
		err = -EPERM;
	if (!err)
		return fd;
	close(fd);
	return err;
}

/* Is @fd still what @path names? */
static inline int kucomms_directory_current(int fd, const char *path)
{
	struct stat there, here;

	return !fstat(fd, &here) && !lstat(path, &there) &&
	       here.st_dev == there.st_dev && here.st_ino == there.st_ino;
}

/*
 * Others hold the lock for a few system calls only, but may be stopped meanwhile.
 * Return: 0, -EWOULDBLOCK after @end, -errno.
 */
static inline int kucomms_directory_lock(int fd, int64_t end)
{
	const struct timespec moment = { 0, 1000000 };

	while (flock(fd, LOCK_EX | LOCK_NB)) {
		if (errno == EINTR)
			continue;
		if (errno != EWOULDBLOCK)
			return -errno;
		if (!kucomms_poll_time(end))
			return -EWOULDBLOCK;
		nanosleep(&moment, NULL);
	}
	return 0;
}

/*
 * Create the directory if need be and lock it. A closing listener removes it
 * when it is empty, so what was opened may be gone when the lock is ours.
 * Return: a descriptor, -EWOULDBLOCK after KUCOMMS_LOCK_MS, or -errno.
 */
static inline int kucomms_directory_enter(const char *path)
{
	int64_t end = kucomms_deadline(KUCOMMS_LOCK_MS);
	int err, fd;

	for (;;) {
		if (mkdir(path, 0700) && errno != EEXIST)
			return -errno;
		fd = kucomms_directory_open(path);
		if (fd == -ENOENT)
			continue;
		if (fd < 0)
			return fd;
		err = kucomms_directory_lock(fd, end);
		if (!err && kucomms_directory_current(fd, path))
			return fd;
		close(fd);
		if (err)
			return err;
	}
}

/* By way of the descriptor: no path is too long, and none changes meanwhile. */
static inline void kucomms_socket_address(struct sockaddr_un *address,
					  int directory, const char *name)
{
	memset(address, 0, sizeof(*address));
	address->sun_family = AF_UNIX;
	snprintf(address->sun_path, sizeof(address->sun_path),
		 "/proc/self/fd/%d/%.*s", directory, KUCOMMS_NAME_MAX, name);
}

static inline int kucomms_socket_new(void)
{
	int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);

	return fd < 0 ? -errno : fd;
}

static inline int kucomms_socket_connect(int fd, int directory,
					 const char *name)
{
	struct sockaddr_un address;

	kucomms_socket_address(&address, directory, name);
	return connect(fd, (const struct sockaddr *)&address,
		       sizeof(address)) ? -errno : 0;
}

/* ---- the peer's process ------------------------------------------------- */

/*
 * Return: a pidfd of the peer, -ESRCH when it is dead, -ENOSYS when there is no
 * way to have one (an old kernel; a process of a namespace that we cannot see),
 * -errno.
 */
static inline int kucomms_peer_pidfd(int fd)
{
	struct kucomms_credentials peer;
	socklen_t size = sizeof(int);
	int pidfd;

	if (!getsockopt(fd, SOL_SOCKET, KUCOMMS_SO_PEERPIDFD, &pidfd, &size))
		return pidfd;
	if (errno == ESRCH || errno == EINVAL || errno == ENODATA)
		return -ESRCH;
	if (errno != ENOPROTOOPT)
		return -errno;
	size = sizeof(peer);
	if (getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &size))
		return -errno;
	if (peer.pid <= 0)
		return -ENOSYS;
	pidfd = (int)syscall(KUCOMMS_SYS_PIDFD_OPEN, peer.pid, 0);
	return pidfd < 0 ? -errno : pidfd;
}

/* ---- the records of the rendezvous -------------------------------------- */

static inline void kucomms_client_drop(struct kucomms_client *client)
{
	if (client->epoll >= 0)
		close(client->epoll);
	if (client->pidfd >= 0)
		close(client->pidfd);
	if (client->socket >= 0)
		close(client->socket);
	if (client->device >= 0)
		close(client->device);
	client->epoll = -1;
	client->pidfd = -1;
	client->socket = -1;
	client->device = -1;
	client->error = -EBADF;
}

static inline void kucomms_client_clear(struct kucomms_client *client)
{
	memset(client, 0, sizeof(*client));
	client->socket = -1;
	client->pidfd = -1;
	client->device = -1;
	client->epoll = -1;
	client->error = -EBADF;
	client->number = -1;
}

/*
 * Take over a connected socket, see who is there. The pidfd is opened before
 * the peer's next record is read: the record then proves that the process
 * lived, so its number had not gone to another one. Return: 0, -EPERM, -EPIPE
 * when it is dead already, -errno.
 */
static inline int kucomms_client_begin(struct kucomms_client *client, int fd)
{
	struct kucomms_credentials peer;
	socklen_t size = sizeof(peer);
	int pidfd;

	kucomms_client_clear(client);
	client->socket = fd;
	if (getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &size))
		return -errno;
	if (peer.uid != geteuid())
		return -EPERM;
	client->peer_pid = peer.pid;
	client->peer_uid = peer.uid;
	pidfd = kucomms_peer_pidfd(fd);
	if (pidfd == -ESRCH)
		return -EPIPE;
	if (pidfd < 0 && pidfd != -ENOSYS)
		return pidfd;
	client->pidfd = pidfd < 0 ? -1 : pidfd;
	return 0;
}

static inline void kucomms_record_fill(struct kucomms_rendezvous *record,
				       uint32_t step, uint64_t ring_size)
{
	memset(record, 0, sizeof(*record));
	record->magic = KUCOMMS_MAGIC;
	record->version = KUCOMMS_ABI_VERSION;
	record->step = step;
	record->features = KUCOMMS_CLIENT_FEATURES;
	record->ring_size = ring_size;
}

/* Room for descriptors of a record, aligned as the macros want it. */
union kucomms_ancillary {
	struct cmsghdr align;
	char space[CMSG_SPACE(4 * sizeof(int))];
};

/* Send a record, with @file unless it is -1. Return: 0, -EPIPE or -errno. */
static inline int kucomms_record_send(int fd, struct kucomms_rendezvous *record,
				      int file)
{
	union kucomms_ancillary ancillary;
	struct cmsghdr *header;
	struct msghdr message;
	struct iovec part;
	ssize_t sent;

	memset(&message, 0, sizeof(message));
	part.iov_base = record;
	part.iov_len = sizeof(*record);
	message.msg_iov = &part;
	message.msg_iovlen = 1;
	if (file >= 0) {
		memset(&ancillary, 0, sizeof(ancillary));
		message.msg_control = ancillary.space;
		message.msg_controllen = CMSG_SPACE(sizeof(int));
		header = CMSG_FIRSTHDR(&message);
		header->cmsg_level = SOL_SOCKET;
		header->cmsg_type = SCM_RIGHTS;
		header->cmsg_len = CMSG_LEN(sizeof(int));
		memcpy(CMSG_DATA(header), &file, sizeof(int));
	}
	do {
		sent = sendmsg(fd, &message, MSG_NOSIGNAL | MSG_DONTWAIT);
	} while (sent < 0 && errno == EINTR);
	if (sent < 0)
		return errno == ECONNRESET ? -EPIPE : -errno;
	/* The buffer of a new socket holds all three records with ease. */
	return sent == (ssize_t)sizeof(*record) ? 0 : -EPROTO;
}

/*
 * Keep the only descriptor that came, close what is too many. Return: 0 or
 * -EPROTO.
 */
static inline int kucomms_record_files(struct msghdr *message, int *file)
{
	struct cmsghdr *header;
	size_t count, i;
	int fd, err = 0;

	if (message->msg_flags & MSG_CTRUNC)
		err = -EPROTO;
	for (header = CMSG_FIRSTHDR(message); header;
	     header = CMSG_NXTHDR(message, header)) {
		if (header->cmsg_level != SOL_SOCKET ||
		    header->cmsg_type != SCM_RIGHTS)
			continue;
		count = (header->cmsg_len - CMSG_LEN(0)) / sizeof(int);
		for (i = 0; i < count; i++) {
			memcpy(&fd, CMSG_DATA(header) + i * sizeof(int),
			       sizeof(int));
			if (*file < 0) {
				*file = fd;
			} else {
				close(fd);
				err = -EPROTO;
			}
		}
	}
	return err;
}

/* Read bytes of a record as they come. Return: 0, -EPIPE, -ETIMEDOUT, ... */
static inline int kucomms_record_read(struct kucomms_client *client,
				      struct kucomms_rendezvous *record,
				      int *file, int64_t end)
{
	union kucomms_ancillary ancillary;
	struct msghdr message;
	struct pollfd fds[2];
	struct iovec part;
	size_t have = 0;
	int err, timeout;
	ssize_t count;

	while (have < sizeof(*record)) {
		fds[0].fd = client->socket;
		fds[0].events = POLLIN;
		fds[1].fd = client->pidfd;
		fds[1].events = POLLIN;
		timeout = kucomms_poll_time(end);
		if (poll(fds, 2, timeout) < 0)
			return -errno;
		memset(&message, 0, sizeof(message));
		part.iov_base = (unsigned char *)record + have;
		part.iov_len = sizeof(*record) - have;
		message.msg_iov = &part;
		message.msg_iovlen = 1;
		message.msg_control = ancillary.space;
		message.msg_controllen = sizeof(ancillary.space);
		count = recvmsg(client->socket, &message,
				MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
		if (count > 0) {
			err = kucomms_record_files(&message, file);
			if (err)
				return err;
			have += (size_t)count;
		} else if (!count || errno == ECONNRESET || fds[1].revents) {
			return -EPIPE;
		} else if (errno != EAGAIN && errno != EINTR) {
			return -errno;
		} else if (!timeout) {
			return -ETIMEDOUT;
		}
	}
	return 0;
}

/*
 * Receive a record and check all of it but the size of the ring. @file is -1
 * or the descriptor that came with it, the caller's to close in any case.
 * Return: 0, -EPIPE, -ETIMEDOUT, -EPROTO, -EPROTONOSUPPORT, -errno.
 */
static inline int kucomms_record_receive(struct kucomms_client *client,
					 struct kucomms_rendezvous *record,
					 uint32_t step, int *file, int64_t end)
{
	int err;

	*file = -1;
	err = kucomms_record_read(client, record, file, end);
	if (err)
		return err;
	if (record->magic != KUCOMMS_MAGIC)
		return -EPROTO;
	if (record->version != KUCOMMS_ABI_VERSION)
		return -EPROTONOSUPPORT;
	if (record->step != step || record->pool ||
	    record->hello_length > KUCOMMS_HELLO_MAX)
		return -EPROTO;
	/* Who greets, or refuses, says what it knows; else it is what is in force. */
	if (record->features & ~KUCOMMS_FEATURES ||
	    (step != KUCOMMS_STEP_HELLO && !record->status &&
	     record->features & ~KUCOMMS_CLIENT_FEATURES))
		return -EPROTONOSUPPORT;
	if (step == KUCOMMS_STEP_HELLO)	/* we know no eventfds: say no more */
		record->flags &= ~(uint32_t)KUCOMMS_EVENTFDS;
	if (step != KUCOMMS_STEP_SETUP)
		return record->status || record->flags || *file >= 0 ?
		       -EPROTO : 0;
	if (record->flags & ~(uint32_t)KUCOMMS_SEALED ||
	    (*file >= 0) != (record->status == KUCOMMS_ACCEPTED))
		return -EPROTO;
	return 0;
}

/* ---- connecting --------------------------------------------------------- */

/* Map the memory that the listener made. Return: 0, -EPROTO, -errno. */
static inline int kucomms_client_map(struct kucomms_client *client, int file,
				     uint64_t ring_size, uint64_t features)
{
	uint64_t side;
	struct stat status;
	int err;

	if (!ring_size || kucomms_ring_size(ring_size) != ring_size)
		return -EPROTO;
	side = kucomms_side_size(ring_size);
	if (fstat(file, &status))
		return -errno;
	if (!S_ISREG(status.st_mode) || (uint64_t)status.st_size != 2 * side)
		return -EPROTO;
	err = kucomms_channel_init(&client->channel, 1, ring_size, features,
				   file, side);
	if (err)
		return err;
	err = kucomms_channel_attach(&client->channel, file, 0);
	if (err)
		kucomms_channel_destroy(&client->channel);
	return err;
}

static inline int kucomms_connect_handshake(struct kucomms_client *client,
					    uint64_t ring_size, int64_t end)
{
	struct kucomms_rendezvous record;
	int err, file;

	kucomms_record_fill(&record, KUCOMMS_STEP_HELLO, ring_size);
	err = kucomms_record_send(client->socket, &record, -1);
	if (err)
		return err;
	err = kucomms_record_receive(client, &record, KUCOMMS_STEP_SETUP, &file,
				     end);
	if (err)
		goto out;
	switch (record.status) {
	case KUCOMMS_ACCEPTED:
		break;
	case KUCOMMS_REFUSED_BUSY:
		return -EBUSY;
	case KUCOMMS_REFUSED_VERSION:
		return -EPROTONOSUPPORT;
	case KUCOMMS_REFUSED_MEMORY:
		return -ENOSPC;
	case KUCOMMS_REFUSED_USER:
		return -EPERM;
	default:
		return -EPROTO;
	}
	/* It may give less than was asked for, never more. */
	if (ring_size && record.ring_size > ring_size &&
	    record.ring_size > kucomms_ring_size(ring_size)) {
		err = -EPROTO;
		goto out;
	}
	/* Sealed memory is for links between users; we make none of those. */
	err = record.flags & KUCOMMS_SEALED ? -EPROTONOSUPPORT :
	      kucomms_client_map(client, file, record.ring_size,
				 record.features);
	if (err)
		goto out;
	kucomms_record_fill(&record, KUCOMMS_STEP_ATTACH, record.ring_size);
	err = kucomms_record_send(client->socket, &record, -1);
	if (err)
		kucomms_channel_destroy(&client->channel);
out:
	if (file >= 0)
		close(file);
	return err;
}

/* -EAGAIN when nobody is there (any more). */
static inline int kucomms_connect_once(struct kucomms_client *client,
				       const char *path, const char *name,
				       uint64_t ring_size, int64_t end)
{
	int directory, err, fd;

	directory = kucomms_directory_open(path);
	if (directory < 0)
		return directory == -ENOENT ? -EAGAIN : directory;
	fd = kucomms_socket_new();
	if (fd < 0) {
		close(directory);
		return fd;
	}
	err = kucomms_socket_connect(fd, directory, name);
	close(directory);
	if (err) {
		close(fd);
		return err == -ENOENT || err == -ECONNREFUSED ? -EAGAIN : err;
	}
	err = kucomms_client_begin(client, fd);
	if (!err)
		err = kucomms_connect_handshake(client, ring_size, end);
	if (err)
		kucomms_client_drop(client);
	else
		client->error = 0;
	return err == -EPIPE ? -EAGAIN : err;
}

/* ---- connecting to a kernel module -------------------------------------- */

/* Map what was set up, and watch it. Return: 0, -EPROTONOSUPPORT, -errno. */
static inline int kucomms_device_attach(struct kucomms_client *client,
					const struct kucomms_setup *setup)
{
	struct epoll_event event;
	int err;

	if (setup->side_size != kucomms_side_size(setup->ring_size) ||
	    setup->features & ~KUCOMMS_CLIENT_FEATURES)
		return -EPROTONOSUPPORT;
	err = kucomms_channel_init(&client->channel, 1, setup->ring_size,
				   setup->features, client->device,
				   setup->side_offset[1]);
	if (err)
		return err;
	err = kucomms_channel_attach(&client->channel, client->device,
				     setup->side_offset[0]);
	if (err)
		goto err_channel;
	client->epoll = epoll_create1(EPOLL_CLOEXEC);
	memset(&event, 0, sizeof(event));
	/* An event is one ring: who does not sleep need not take it back. */
	event.events = EPOLLIN | EPOLLOUT | EPOLLET;
	if (client->epoll < 0 ||
	    epoll_ctl(client->epoll, EPOLL_CTL_ADD, client->device, &event)) {
		err = -errno;
		goto err_channel;
	}
	if (setup->flags & KUCOMMS_SETUP_NUMBER)
		client->number = setup->channel;
	return 0;

err_channel:
	kucomms_channel_destroy(&client->channel);
	return err;
}

/* Sleep until the device has news of a set-up. Return: 0, -ETIMEDOUT, -errno. */
static inline int kucomms_device_sleep(struct kucomms_client *client,
				       int64_t end)
{
	struct pollfd news;
	int count;

	news.fd = client->device;
	news.events = POLLPRI;
	count = poll(&news, 1, kucomms_poll_time(end));
	return count < 0 ? -errno : count ? 0 : -ETIMEDOUT;
}

/*
 * Make a channel of the open device; wait for one of this @number, unless it is
 * -1, as long as the endpoint is there, and until @answer for the end of a channel
 * that is just being closed and for what the endpoint says. Return: 0, -EAGAIN
 * when it is not there, -ECHRNG, -EADDRINUSE, -EDQUOT, -EBUSY, -ESHUTDOWN,
 * -ETIMEDOUT, -EINTR, other -errno.
 */
static inline int kucomms_device_set_up(struct kucomms_client *client,
					uint64_t ring_size, int64_t number,
					int64_t end, int64_t answer)
{
	struct kucomms_setup setup;
	int err;

	for (;;) {
		memset(&setup, 0, sizeof(setup));
		setup.version = KUCOMMS_ABI_VERSION;
		setup.features = KUCOMMS_CLIENT_FEATURES;
		setup.ring_size = ring_size;
		if (number >= 0) {
			setup.flags = KUCOMMS_SETUP_NUMBER;
			setup.channel = (uint32_t)number;
		}
		if (!ioctl(client->device, KUCOMMS_IOC_SETUP, &setup))
			return kucomms_device_attach(client, &setup);
		err = -errno;
		if (err == -ENOTCONN)
			return -EAGAIN;
		if (err == -EINPROGRESS || err == -EAGAIN) {
			err = kucomms_device_sleep(client, answer);
		} else if (err == -ECHRNG && number >= 0 && kucomms_poll_time(end)) {
			err = kucomms_device_sleep(client, end);
			if (err == -ETIMEDOUT)
				err = 0;	/* the next try says ECHRNG */
		}
		if (err)
			return err;
	}
}

/* -EAGAIN when there is no device or no endpoint. */
static inline int kucomms_device_connect(struct kucomms_client *client,
					 const char *name, int64_t number,
					 uint64_t ring_size, int64_t end,
					 int64_t answer)
{
	char path[sizeof("/dev/kucomms_") + KUCOMMS_NAME_MAX];
	int err;

	snprintf(path, sizeof(path), "/dev/kucomms_%.*s", KUCOMMS_NAME_MAX,
		 name);
	client->device = open(path, O_RDWR | O_CLOEXEC | O_NONBLOCK);
	if (client->device < 0)
		return errno == ENOENT || errno == ENXIO || errno == ENODEV ?
		       -EAGAIN : -errno;
	err = kucomms_device_set_up(client, ring_size, number, end, answer);
	if (err)
		kucomms_client_drop(client);
	else
		client->error = 0;
	return err;
}

/**
 * kucomms_connect - make a link to whoever listens at a URL
 * @client: filled in; after an error kucomms_client_close() does nothing
 * @url: shm://NAME, kernel://NAME, kernel://NAME/NUMBER
 * @ring_size: bytes per direction, 0 for the listener's default
 * @timeout_ms: how long to wait for a listener, or for the kernel endpoint and
 *		its channel of this number. With 0 it is tried once, and a
 *		listener or kernel endpoint that is there has
 *		KUCOMMS_HANDSHAKE_MS to answer
 *
 * Return: 0, -EAGAIN or -ETIMEDOUT when nobody listens, -ETIMEDOUT also when
 * somebody does and does not answer, -EBUSY, -EPERM, -EINVAL, -EINTR, -EPROTO,
 * -EPROTONOSUPPORT, -ENOSPC when the listener has no memory, other -errno. From
 * the kernel also -ECHRNG, -EADDRINUSE when somebody else has the channel,
 * -EDQUOT when this user has all that the endpoint gives one user,
 * -ESHUTDOWN when the module goes just then, and what the endpoint says.
 */
static inline int kucomms_connect(struct kucomms_client *client,
				  const char *url, uint64_t ring_size,
				  int timeout_ms)
{
	int64_t end = kucomms_deadline(timeout_ms), answer = end;
	char name[KUCOMMS_NAME_MAX + 1];
	int err, left, kernel, pause = 1;
	char path[PATH_MAX];
	int64_t number;

	kucomms_client_clear(client);
	kernel = !kucomms_url_channel(url, name, &number);
	err = kernel ? 0 : kucomms_url_name(url, name);
	if (!err && !kernel)
		err = kucomms_directory_path(path, sizeof(path));
	if (err)
		return err;
	if (!timeout_ms)
		answer = kucomms_deadline(KUCOMMS_HANDSHAKE_MS);
	for (;;) {
		if (kernel)
			err = kucomms_device_connect(client, name, number,
						     ring_size, end, answer);
		else
			err = kucomms_connect_once(client, path, name,
						   ring_size, answer);
		if ((err != -EAGAIN && err != -ESHUTDOWN) || !timeout_ms)
			return err;
		left = kucomms_poll_time(end);
		if (!left)
			return -ETIMEDOUT;
		if (left > 0 && left < pause)
			pause = left;
		if (poll(NULL, 0, pause) < 0)
			return -errno;
		if (pause < 20)
			pause *= 2;
	}
}

/* ---- listening ---------------------------------------------------------- */

/*
 * May this name be bound? What a dead listener left is removed; it is dead, too,
 * when its socket lives on in a child. Return: 0, -EADDRINUSE or -errno.
 */
static inline int kucomms_name_take(int directory, const char *name)
{
	struct pollfd process;
	struct stat status;
	int err, fd;

	/* What refuses a connection need not be a socket: it may be a file. */
	if (fstatat(directory, name, &status, AT_SYMLINK_NOFOLLOW))
		return errno == ENOENT ? 0 : -errno;
	if (!S_ISSOCK(status.st_mode) || status.st_uid != geteuid())
		return -EPERM;
	fd = kucomms_socket_new();
	if (fd < 0)
		return fd;
	err = kucomms_socket_connect(fd, directory, name);
	if (!err) {
		process.fd = kucomms_peer_pidfd(fd);
		process.events = POLLIN;
		err = -EADDRINUSE;
		if (process.fd == -ESRCH) {
			err = -ECONNREFUSED;
		} else if (process.fd >= 0) {
			if (poll(&process, 1, 0) > 0)
				err = -ECONNREFUSED;
			close(process.fd);
		}
	}
	close(fd);
	if (err == -ENOENT)
		return 0;
	if (err == -EAGAIN)	/* it has more connectors than it accepts */
		return -EADDRINUSE;
	if (err != -ECONNREFUSED)
		return err;
	return unlinkat(directory, name, 0) && errno != ENOENT ? -errno : 0;
}

static inline int kucomms_listener_bind(struct kucomms_listener *listener)
{
	struct sockaddr_un address;
	struct stat status;
	int err;

	err = kucomms_name_take(listener->directory, listener->name);
	if (err)
		return err;
	listener->socket = kucomms_socket_new();
	if (listener->socket < 0)
		return listener->socket;
	kucomms_socket_address(&address, listener->directory, listener->name);
	if (bind(listener->socket, (const struct sockaddr *)&address,
		 sizeof(address)))
		goto err_socket;
	if (listen(listener->socket, 128) ||
	    fstatat(listener->directory, listener->name, &status,
		    AT_SYMLINK_NOFOLLOW))
		goto err_unlink;
	listener->device = status.st_dev;
	listener->inode = status.st_ino;
	return 0;

err_unlink:
	err = -errno;
	unlinkat(listener->directory, listener->name, 0);
	close(listener->socket);
	listener->socket = -1;
	return err;
err_socket:
	err = -errno;
	close(listener->socket);
	listener->socket = -1;
	return err;
}

/*
 * Remove what a process left that was killed between making and unlinking. Even
 * while one is doing that it needs the name no more: it holds a descriptor.
 */
static inline void kucomms_memory_sweep(void)
{
	DIR *directory = opendir("/dev/shm");
	char name[NAME_MAX + 2], ours[32];
	struct dirent *entry;
	int length;

	if (!directory)
		return;
	length = snprintf(ours, sizeof(ours), "kucomms-%u-",
			  (unsigned int)geteuid());
	while ((entry = readdir(directory))) {
		if (strncmp(entry->d_name, ours, (size_t)length))
			continue;
		snprintf(name, sizeof(name), "/%s", entry->d_name);
		shm_unlink(name);
	}
	closedir(directory);
}

/* New memory, that nobody else can find. Return: a descriptor or -errno. */
static inline int kucomms_memory_create(uint64_t size)
{
	unsigned long long random[2];
	char name[NAME_MAX];
	int err, fd;

	if (getrandom(random, sizeof(random), 0) != (ssize_t)sizeof(random))
		return -EIO;
	snprintf(name, sizeof(name), "/kucomms-%u-%d-%016llx%016llx",
		 (unsigned int)geteuid(), (int)getpid(), random[0], random[1]);
	fd = shm_open(name, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
	if (fd < 0)
		return -errno;
	shm_unlink(name);
	err = ftruncate(fd, (off_t)size) ? -errno : 0;
	/* Allocated now, a full /dev/shm is an error; later it were SIGBUS. */
	while (!err) {
		err = -posix_fallocate(fd, 0, (off_t)size);
		if (err != -EINTR)
			break;
		err = 0;
	}
	if (!err)
		return fd;
	close(fd);
	return err;
}

/**
 * kucomms_listener_open - take a name
 * @listener: filled in; after an error kucomms_listener_close() does nothing
 * @url: shm://NAME
 * @ring_size: bytes per direction for those who ask for none, 0: the default
 *
 * Takes over what a dead listener left behind.
 *
 * Return: 0, -EADDRINUSE, -EINVAL, -EPERM, -EWOULDBLOCK when another process of
 * this user has kept the directory of sockets locked for KUCOMMS_LOCK_MS (is one
 * stopped while it takes a name?), or other -errno.
 */
static inline int kucomms_listener_open(struct kucomms_listener *listener,
					const char *url, uint64_t ring_size)
{
	char path[PATH_MAX];
	int again, err;

	memset(listener, 0, sizeof(*listener));
	listener->socket = -1;
	listener->directory = -1;
	err = kucomms_url_name(url, listener->name);
	if (err)
		return err;
	listener->ring_size = kucomms_ring_size(ring_size ? ring_size :
						KUCOMMS_RING_DEFAULT);
	if (!listener->ring_size)
		return -EINVAL;
	listener->max_ring_size = KUCOMMS_RING_LIMIT;
	if (listener->max_ring_size < listener->ring_size)
		listener->max_ring_size = listener->ring_size;
	err = kucomms_directory_path(path, sizeof(path));
	if (err)
		return err;
	kucomms_memory_sweep();
	do {
		listener->directory = kucomms_directory_enter(path);
		if (listener->directory < 0)
			return listener->directory;
		err = kucomms_listener_bind(listener);
		/* Removed by force, or by one that does not know the lock? */
		again = err == -ENOENT &&
			!kucomms_directory_current(listener->directory, path);
		flock(listener->directory, LOCK_UN);
		if (err) {
			close(listener->directory);
			listener->directory = -1;
		}
	} while (again);
	return err;
}

/**
 * kucomms_listener_close - give the name back; links that were made live on
 * @listener: of a listener that is closed, or was never opened, nothing happens
 *
 * If the directory stays locked, the name stays as well, for the next one who opens
 * it to take over.
 */
static inline void kucomms_listener_close(struct kucomms_listener *listener)
{
	int64_t end = kucomms_deadline(KUCOMMS_UNLISTEN_MS);
	char path[PATH_MAX];
	struct stat status;

	if (listener->socket < 0)
		return;
	/* While our socket is open, no other can have its inode number. */
	if (!kucomms_directory_lock(listener->directory, end)) {
		if (!fstatat(listener->directory, listener->name, &status,
			     AT_SYMLINK_NOFOLLOW) &&
		    status.st_dev == listener->device &&
		    status.st_ino == listener->inode)
			unlinkat(listener->directory, listener->name, 0);
		if (!kucomms_directory_path(path, sizeof(path)) &&
		    kucomms_directory_current(listener->directory, path))
			rmdir(path);	/* if nobody else listens there */
	}
	close(listener->directory);	/* and the lock with it */
	close(listener->socket);
	listener->directory = -1;
	listener->socket = -1;
}

static inline void kucomms_listener_refuse(struct kucomms_client *client,
					   uint32_t status)
{
	struct kucomms_rendezvous record;

	kucomms_record_fill(&record, KUCOMMS_STEP_SETUP, 0);
	record.status = status;
	kucomms_record_send(client->socket, &record, -1);
}

static inline int kucomms_listener_handshake(struct kucomms_listener *listener,
					     struct kucomms_client *client)
{
	int64_t end = kucomms_deadline(KUCOMMS_HANDSHAKE_MS);
	struct kucomms_rendezvous record;
	int err, file, memory;
	uint64_t size, side;

	err = kucomms_record_receive(client, &record, KUCOMMS_STEP_HELLO, &file,
				     end);
	if (file >= 0)
		close(file);
	/* One that knows no turns would send when it likes. */
	if (!err && listener->features & ~record.features)
		err = -EPROTONOSUPPORT;
	if (err == -EPROTONOSUPPORT)
		kucomms_listener_refuse(client, KUCOMMS_REFUSED_VERSION);
	if (err)
		return err;
	size = listener->ring_size;
	if (record.ring_size) {
		size = kucomms_ring_size(record.ring_size);
		if (!size || size > listener->max_ring_size)
			size = listener->max_ring_size;
	}
	side = kucomms_side_size(size);
	memory = kucomms_memory_create(2 * side);
	err = memory < 0 ? memory :
	      kucomms_channel_init(&client->channel, 0, size,
				   listener->features, memory, 0);
	if (err) {
		kucomms_listener_refuse(client, KUCOMMS_REFUSED_MEMORY);
		goto out;
	}
	kucomms_record_fill(&record, KUCOMMS_STEP_SETUP, size);
	record.features = client->channel.features;
	err = kucomms_record_send(client->socket, &record, memory);
	if (err)
		goto err_channel;
	err = kucomms_record_receive(client, &record, KUCOMMS_STEP_ATTACH,
				     &file, end);
	if (file >= 0)
		close(file);
	if (!err && record.ring_size && record.ring_size != size)
		err = -EPROTO;
	if (!err)
		err = kucomms_channel_attach(&client->channel, memory, side);
	if (!err)
		goto out;
err_channel:
	kucomms_channel_destroy(&client->channel);
out:
	if (memory >= 0)
		close(memory);
	return err;
}

/**
 * kucomms_listener_accept - make a link with the next that connects
 * @listener: open
 * @client: filled in; after an error kucomms_client_close() does nothing
 * @timeout_ms: how long to wait
 *
 * Who breaks the rules of the rendezvous, or is not done with it within
 * KUCOMMS_HANDSHAKE_MS, is dropped and counted, and the next one taken.
 * One at a time: a peer that says nothing holds up those behind it for that
 * long. (The Python listener serves many at once.)
 * To wait for more than one thing, poll() for @listener->socket to be readable
 * and accept with timeout 0.
 *
 * Return: 0, -EAGAIN, -ETIMEDOUT, -EINTR, -ENOSPC or -ENOMEM when there is no
 * memory for the rings, -EINVAL for features that are not for C programs, other
 * -errno.
 */
static inline int kucomms_listener_accept(struct kucomms_listener *listener,
					  struct kucomms_client *client,
					  int timeout_ms)
{
	int64_t end = kucomms_deadline(timeout_ms);
	struct pollfd ready;
	int err, fd, left;

	kucomms_client_clear(client);
	if (listener->features & ~KUCOMMS_CLIENT_FEATURES)
		return -EINVAL;
	for (;;) {
		left = kucomms_poll_time(end);
		ready.fd = listener->socket;
		ready.events = POLLIN;
		err = poll(&ready, 1, left);
		if (err < 0)
			return -errno;
		if (!err)
			return timeout_ms ? -ETIMEDOUT : -EAGAIN;
		/* As a system call: accept4() is for _GNU_SOURCE only. */
		fd = (int)syscall(SYS_accept4, listener->socket, NULL, NULL,
				  SOCK_CLOEXEC | SOCK_NONBLOCK);
		if (fd < 0) {
			if (errno == EAGAIN || errno == ECONNABORTED)
				continue;
			return -errno;
		}
		err = kucomms_client_begin(client, fd);
		if (!err)
			err = kucomms_listener_handshake(listener, client);
		if (!err) {
			client->error = 0;
			return 0;
		}
		kucomms_client_drop(client);
		if (err != -EPROTO && err != -EPROTONOSUPPORT &&
		    err != -EPERM && err != -EPIPE && err != -ETIMEDOUT)
			return err;
		listener->dropped++;
		if (!left)
			return timeout_ms ? -ETIMEDOUT : -EAGAIN;
	}
}

/* ---- the doorbell and the peer's life ----------------------------------- */

/* No more will come, so what the peer left half-written is to be skipped. */
static inline void kucomms_client_lost(struct kucomms_client *client)
{
	client->gone = 1;
	client->channel.rx.final = 1;
}

/* What says that all was received and no more comes. */
static inline int kucomms_client_end(const struct kucomms_client *client)
{
	if (client->device >= 0 && kucomms_ring_peer_state(&client->channel.rx) ==
				   KUCOMMS_STATE_SHUTDOWN)
		return -ESHUTDOWN;
	return -EPIPE;
}

/* Ring a kernel module. Return: 0, -EPIPE, -ESHUTDOWN, -EPROTO. */
static inline int kucomms_client_kick(struct kucomms_client *client)
{
	if (!ioctl(client->device, KUCOMMS_IOC_KICK))
		return 0;
	if (errno == EPROTO) {
		client->error = kucomms_channel_fault(&client->channel,
						      -EPROTO);
		return client->error;
	}
	kucomms_client_lost(client);
	return kucomms_client_end(client);
}

/*
 * That a bell finds no memory is no error of what it was rung for: a message
 * that was put is sent. Return: 0, -EPIPE, or as kucomms_client_kick().
 */
static inline int kucomms_client_ring(struct kucomms_client *client)
{
	const unsigned char bell = KUCOMMS_DOORBELL;
	ssize_t sent;

	if (client->device >= 0)
		return kucomms_client_kick(client);
	do {
		sent = send(client->socket, &bell, 1,
			    MSG_DONTWAIT | MSG_NOSIGNAL);
	} while (sent < 0 && errno == EINTR);
	/* A full buffer is full of bells: it has been rung. */
	client->unrung = sent < 0 && errno != EAGAIN;
	if (!client->unrung || (errno != EPIPE && errno != ECONNRESET))
		return 0;
	kucomms_client_lost(client);
	return -EPIPE;
}

/* Take the bells off the socket. Return: 0, -EPROTO or -errno. */
static inline int kucomms_client_drain(struct kucomms_client *client)
{
	unsigned char bells[4096];
	ssize_t count, i;

	do {
		count = recv(client->socket, bells, sizeof(bells),
			     MSG_DONTWAIT);
	} while (count < 0 && errno == EINTR);
	if (!count || (count < 0 && errno == ECONNRESET)) {
		kucomms_client_lost(client);
		return 0;
	}
	if (count < 0)
		return errno == EAGAIN ? 0 : -errno;
	for (i = 0; i < count; i++) {
		if (bells[i] == KUCOMMS_DOORBELL)
			continue;
		client->error = kucomms_channel_fault(&client->channel,
						      -EPROTO);
		return client->error;
	}
	return 0;
}

/* As kucomms_client_wait(), for what a kernel module says. */
static inline int kucomms_client_wait_device(struct kucomms_client *client,
					     int timeout)
{
	struct epoll_event event;
	int count = epoll_wait(client->epoll, &event, 1, timeout);

	if (count < 0)
		return -errno;
	client->looked = kucomms_now(CLOCK_MONOTONIC_COARSE);
	if (count && event.events & EPOLLERR) {
		client->error = kucomms_channel_fault(&client->channel,
						      -EPROTO);
		return client->error;
	}
	if (count && event.events & EPOLLHUP)
		kucomms_client_lost(client);
	return count || timeout ? 0 : -ETIMEDOUT;
}

/*
 * Wait for the doorbell or the peer's end, at most until @end. Return: 0 when
 * there was a sign of either, -ETIMEDOUT, -EINTR, -EPROTO, -errno.
 */
static inline int kucomms_client_wait(struct kucomms_client *client,
				      int64_t end)
{
	int timeout = kucomms_poll_time(end);
	struct pollfd fds[2];
	int err = 0;

	if (client->device >= 0)
		return kucomms_client_wait_device(client, timeout);
	fds[0].fd = client->socket;
	fds[0].events = POLLIN;
	fds[1].fd = client->pidfd;
	fds[1].events = POLLIN;
	if (poll(fds, 2, timeout) < 0)
		return -errno;
	client->looked = kucomms_now(CLOCK_MONOTONIC_COARSE);
	if (fds[0].revents)
		err = kucomms_client_drain(client);
	if (client->pidfd >= 0 && fds[1].revents)
		kucomms_client_lost(client);
	if (err || client->gone)
		return err;
	/* Also when there were bells: a peer could go on ringing for ever. */
	return timeout ? 0 : -ETIMEDOUT;
}

/* Look now. Return: 0, -EPROTO, -errno. */
static inline int kucomms_client_look(struct kucomms_client *client)
{
	int err = kucomms_client_wait(client, 0);

	return err == -ETIMEDOUT || err == -EINTR ? 0 : err;
}

/*
 * What says that the peer is gone: its producer page at the price of a load,
 * the descriptors only now and then. Return: 0, -EPROTO, -errno.
 */
static inline int kucomms_client_check(struct kucomms_client *client)
{
	if (client->gone)
		return 0;
	if (client->unrung && kucomms_client_ring(client))
		return 0;
	if (kucomms_ring_peer_state(&client->channel.rx) !=
	    KUCOMMS_STATE_OPEN) {
		kucomms_client_lost(client);
		return 0;
	}
	if (kucomms_now(CLOCK_MONOTONIC_COARSE) - client->looked <
	    KUCOMMS_LIVENESS_MS * 1000000LL)
		return 0;
	return kucomms_client_look(client);
}

/*
 * Say that we sleep, for messages and (unless @length is negative) for space.
 * Return: 0 sleep, 1 try again instead.
 */
static inline int kucomms_client_park(struct kucomms_client *client,
				      int receive, ssize_t length)
{
	struct kucomms_channel *channel = &client->channel;
	int err;

	if (client->unrung)
		kucomms_client_ring(client);
	if (receive && kucomms_channel_park_rx(channel))
		return 1;
	if (length >= 0) {
		err = kucomms_channel_park_tx(channel, (uint32_t)length);
		if (err == 1)
			err = kucomms_client_ring(client);
		if (err)
			return 1;	/* room, or what the caller finds */
	}
	return client->gone ||
	       kucomms_ring_peer_state(&channel->rx) != KUCOMMS_STATE_OPEN;
}

/* ---- sending and receiving ---------------------------------------------- */

static inline int kucomms_client_send_flags(struct kucomms_client *client,
					    const void *data, size_t length,
					    uint32_t flags, uint64_t type,
					    uint64_t id, uint64_t user_value,
					    int timeout_ms)
{
	int64_t end = kucomms_deadline(timeout_ms);
	int err;

	for (;;) {
		if (client->error)
			return client->error;
		if (length > kucomms_message_max(client->channel.ring_size))
			return -EMSGSIZE;
		err = kucomms_client_check(client);
		if (err)
			return err;
		if (client->gone)
			return kucomms_client_end(client);
		err = kucomms_channel_send(&client->channel, data,
					   (uint32_t)length, flags, type, id,
					   user_value);
		if (err == 1)
			return kucomms_client_ring(client);
		if (err == -EPROTO)
			client->error = err;
		if (err != -EAGAIN || !timeout_ms)
			return err;
		if (kucomms_client_park(client, 0, (ssize_t)length))
			continue;
		err = kucomms_client_wait(client, end);
		if (err)
			return err;
	}
}

/**
 * kucomms_client_send - send a message
 * @client: the link
 * @data: copied; may be NULL when @length is 0
 * @length: in bytes, at most the ring less one header
 * @type: the user's, no value reserved
 * @id: the user's, no value reserved
 * @user_value: the user's, no value reserved
 * @timeout_ms: how long to wait while the ring is full
 *
 * Return: 0, -EAGAIN, -ETIMEDOUT, -EINTR (not sent, all three), -EMSGSIZE,
 * -EPIPE or -ESHUTDOWN when the peer is gone, -EPROTO, -EBADF, -EPERM when it is the
 * peer's turn: receive first.
 */
static inline int kucomms_client_send(struct kucomms_client *client,
				      const void *data, size_t length,
				      uint64_t type, uint64_t id,
				      uint64_t user_value, int timeout_ms)
{
	return kucomms_client_send_flags(client, data, length, 0, type, id,
					 user_value, timeout_ms);
}

/**
 * kucomms_client_reply - answer a request
 * @client: the link
 * @request: what was received, whose type, id and user value are sent back
 * @data: copied; may be the request's own
 * @length: in bytes
 * @timeout_ms: how long to wait while the ring is full
 *
 * Return: as kucomms_client_send().
 */
static inline int kucomms_client_reply(struct kucomms_client *client,
				       const struct kucomms_view *request,
				       const void *data, size_t length,
				       int timeout_ms)
{
	return kucomms_client_send_flags(client, data, length,
					 KUCOMMS_FLAG_REPLY, request->type,
					 request->id, request->user_value,
					 timeout_ms);
}

/**
 * kucomms_client_has_turns - whether only one side may send at a time
 * @client: the link
 */
static inline int kucomms_client_has_turns(const struct kucomms_client *client)
{
	return kucomms_channel_has_turns(&client->channel);
}

/**
 * kucomms_client_has_turn - whether this side may send
 * @client: the link; without turns it always may
 */
static inline int kucomms_client_has_turn(const struct kucomms_client *client)
{
	return kucomms_channel_has_turn(&client->channel);
}

/**
 * kucomms_client_pass_turn - have the peer send, with nothing to tell it
 * @client: a link with turns
 * @timeout_ms: how long to wait while the ring is full
 *
 * The peer receives an empty message with KUCOMMS_FLAG_TOKEN.
 *
 * Return: as kucomms_client_send(); -EINVAL when the link has no turns.
 */
static inline int kucomms_client_pass_turn(struct kucomms_client *client,
					   int timeout_ms)
{
	if (!client->error && !kucomms_client_has_turns(client))
		return -EINVAL;
	return kucomms_client_send_flags(client, NULL, 0, KUCOMMS_FLAG_TOKEN,
					 0, 0, 0, timeout_ms);
}

/*
 * Look at the front. Return: 0, -EAGAIN, KUCOMMS_SKIPPED, -EPIPE, -ESHUTDOWN,
 * -EPROTO, -errno.
 */
static inline int kucomms_client_peek(struct kucomms_client *client,
				      struct kucomms_view *view)
{
	struct kucomms_channel *channel = &client->channel;
	int err = kucomms_channel_peek(channel, view);

	if (err == -EAGAIN) {
		err = kucomms_client_check(client);
		if (err)
			return err;
		/* Look again: it may have sent more before it went. */
		err = kucomms_channel_peek(channel, view);
		if (err == -EAGAIN && client->gone)
			return kucomms_client_end(client);
	}
	if (err == -EPROTO)
		client->error = err;
	return err;
}

/* Give back what was read or skipped. */
static inline void kucomms_client_give_back(struct kucomms_client *client)
{
	if (client->channel.rx.position != client->channel.rx.published &&
	    kucomms_channel_release(&client->channel))
		kucomms_client_ring(client);
}

/**
 * kucomms_client_receive - get the next message, in place
 * @client: the link
 * @view: filled in; @view->data is valid until it is released or the link
 *	  closed. A peer that breaks the rules may change it meanwhile, so copy
 *	  what is checked first and used then
 * @timeout_ms: how long to wait
 *
 * With turns it is this side's turn from now on; view->flags has KUCOMMS_FLAG_TOKEN
 * when the peer had no more to say than that.
 *
 * Until it is released the same message is received again. With timeout 0, -EAGAIN
 * may also mean that there is one behind much that the peer has discarded: then
 * kucomms_client_arm() says so.
 *
 * Return: 0, -EAGAIN, -ETIMEDOUT, -EINTR, -EPIPE or -ESHUTDOWN when the peer is
 * gone and all that it sent was received, -EPROTO, -EBADF.
 */
static inline int kucomms_client_receive(struct kucomms_client *client,
					 struct kucomms_view *view,
					 int timeout_ms)
{
	struct kucomms_ring_consumer *rx = &client->channel.rx;
	int64_t end = kucomms_deadline(timeout_ms);
	uint64_t begin = rx->position;
	int err;

	for (;;) {
		if (client->error)
			return client->error;
		err = kucomms_client_peek(client, view);
		if (!err)
			kucomms_channel_take_turn(&client->channel);
		if (err != -EAGAIN && err != KUCOMMS_SKIPPED)
			return err;
		kucomms_client_give_back(client);
		if (!timeout_ms)
			return -EAGAIN;
		/* More than was there can only have come meanwhile, and may go on. */
		if (rx->position - begin > rx->size)
			return kucomms_poll_time(end) ? -EINTR : -ETIMEDOUT;
		if (err == KUCOMMS_SKIPPED || kucomms_client_park(client, 1, -1))
			continue;
		err = kucomms_client_wait(client, end);
		if (err)
			return err;
	}
}

/**
 * kucomms_client_release - done with a message
 * @client: the link
 * @view: what kucomms_client_receive() gave last
 */
static inline void kucomms_client_release(struct kucomms_client *client,
					  const struct kucomms_view *view)
{
	if (client->error)
		return;
	kucomms_channel_advance(&client->channel, view);
	kucomms_client_give_back(client);
}

/**
 * kucomms_client_hold - keep a message, and go on to the next
 * @client: the link
 * @view: what kucomms_client_receive() gave last; its data stay where they are
 * @pin: the caller's, one for each message, not to be moved or copied
 *
 * Instead of kucomms_client_release(). Any number may be held, and let go in any
 * order. What came since the oldest of them is no room for the peer meanwhile. The
 * data are gone with the link.
 */
static inline void kucomms_client_hold(struct kucomms_client *client,
				       const struct kucomms_view *view,
				       struct kucomms_pin *pin)
{
	kucomms_pins_init(pin);
	if (client->error)
		return;
	kucomms_channel_borrow(&client->channel, view, pin);
	kucomms_client_give_back(client);
}

/**
 * kucomms_client_let_go - done with a message that was held
 * @client: the link, which may be closed meanwhile, but not made anew
 * @pin: as for kucomms_client_hold()
 */
static inline void kucomms_client_let_go(struct kucomms_client *client,
					 struct kucomms_pin *pin)
{
	kucomms_channel_unpin_rx(pin);
	if (!client->error)
		kucomms_client_give_back(client);
}

/* ---- poll loops --------------------------------------------------------- */

/**
 * kucomms_client_fd - a descriptor to poll for POLLIN
 * @client: the link, which goes on owning the descriptor
 *
 * What a poll loop does, over and over: send and receive with timeout 0 until
 * that gives -EAGAIN; then kucomms_client_arm(); if that returns 0, poll().
 *
 * Return: the descriptor or -errno.
 */
static inline int kucomms_client_fd(struct kucomms_client *client)
{
	struct epoll_event event;
	int err, fd;

	if (client->socket < 0 && client->device < 0)
		return -EBADF;
	if (client->epoll >= 0)
		return client->epoll;
	fd = epoll_create1(EPOLL_CLOEXEC);
	if (fd < 0)
		return -errno;
	memset(&event, 0, sizeof(event));
	event.events = EPOLLIN;
	if (epoll_ctl(fd, EPOLL_CTL_ADD, client->socket, &event) ||
	    (client->pidfd >= 0 &&
	     epoll_ctl(fd, EPOLL_CTL_ADD, client->pidfd, &event))) {
		err = -errno;
		close(fd);
		return err;
	}
	client->epoll = fd;
	return fd;
}

/**
 * kucomms_client_arm - the last thing to do before poll()
 * @client: the link
 * @receive: wake up for messages
 * @length: wake up when a message of this length can be sent; -1 for no
 *
 * Every other call disarms: doorbells that it finds are taken off the socket.
 *
 * Return: 0 poll now, 1 something can be done already, -EPROTO, -EBADF.
 */
static inline int kucomms_client_arm(struct kucomms_client *client, int receive,
				     ssize_t length)
{
	int err = client->error;

	if (!err)
		err = kucomms_client_look(client);
	return err ? err : kucomms_client_park(client, receive, length);
}

/* ---- closing ------------------------------------------------------------ */

/**
 * kucomms_client_close - close the link in order
 * @client: of a link that is closed, or was never made, nothing happens
 *
 * What was sent before is still delivered.
 */
static inline void kucomms_client_close(struct kucomms_client *client)
{
	unsigned char bells[4096];

	if (client->socket < 0 && client->device < 0)
		return;
	/* After a breach of the rules the peer shall see no orderly end. */
	if (client->error != -EPROTO) {
		kucomms_channel_close(&client->channel, KUCOMMS_STATE_CLOSED);
		kucomms_client_ring(client);
	}
	if (client->socket >= 0) {
		shutdown(client->socket, SHUT_RDWR);
		/* Bells that nobody read would make our end "reset". */
		while (recv(client->socket, bells, sizeof(bells),
			    MSG_DONTWAIT) > 0)
			;
	}
	kucomms_client_drop(client);
	kucomms_channel_destroy(&client->channel);
}

#endif /* _KUCOMMS_CLIENT_H */
