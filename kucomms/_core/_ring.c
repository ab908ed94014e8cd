/* SPDX-License-Identifier: GPL-2.0-only OR MIT */
/*
 * kucomms._core._ring: what runs per message.
 *
 * These calls keep the GIL: they are shorter than giving it up and getting it
 * back, and with another busy thread each getting back may take a whole switch
 * interval. Set-up goes through _setup (cffi), which drops it.
 *
 * A call answers with a small number, not with an exception: the caller knows
 * the URL and writes the message. Only what is wrong with an argument
 * (TypeError, OverflowError, BufferError) and want of memory is raised here.
 *
 * Everything here runs under the GIL, also the ends of views, so that neither
 * the objects nor the ring need a lock; the one in struct kucomms_channel is
 * for C threads. Only polling drops it, after a moment.
 */
#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030B0000
#include <Python.h>
#include <structmember.h>

#include <stdlib.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/uio.h>

#include <kucomms/channel.h>

enum status {
	OK,		/* done */
	FULL,		/* no room now */
	EMPTY,		/* no message now */
	TOO_LARGE,	/* never fits */
	CLOSED,		/* not open (any more) for this */
	PROTOCOL,	/* the peer broke the rules */
	WRONG_THREAD,	/* of another thread than attach() */
	FORKED,		/* the channel was made before a fork */
	TOO_MANY_LOANS,
	PAUSE,		/* the loop wants a turn first */
	MORE,		/* as OK, and there may be more at once */
	OUT_OF_TURN,	/* it is the peer's turn to send */
	NO_TOKEN,	/* a token with data or as a reply, or without turns */
};

#define PACE		64		/* sends between two PAUSEs */
#define POLL_MOST	64		/* channels polled at once */
#define POLL_HELD	24		/* looks before the GIL is dropped */
#define GLANCE		8		/* messages between two looks at the clock */

struct module_state {
	PyTypeObject *channel_type;
	PyTypeObject *reservation_type;
	PyTypeObject *borrow_type;
	PyTypeObject *message_type;	/* set by configure() */
	PyTypeObject *token_type;	/* likewise, a kind of message */
	PyTypeObject *coroutine_type;	/* likewise */
	PyObject *name_data;
	PyObject *name_type;
	PyObject *name_id;
	PyObject *name_user_value;
};

typedef struct channel_object {
	PyObject_HEAD
	struct kucomms_channel *channel;
	PyObject *doorbell;		/* wakes the peer; any thread */
	int eventfd;			/* does so instead, or -1 */
	PyObject *room;			/* called when a dropped loan's bytes are free */
	PyObject *requests;		/* a dict, by the ids that are waited for */
	PyObject *frames;		/* takes those that are no plain messages */
	int receiving;			/* inside receive(), which runs Python code */
	unsigned long owner;		/* thread of attach() */
	unsigned long generation;	/* of forks, at birth */
	int attached;
	int open;			/* for sending */
	int mapped;
	int unmap_wanted;
	unsigned int users;		/* loans and borrows whose bytes are in use */
	unsigned int loans;
	int holds_turn;		/* see hold_turn() */
	unsigned int loan_limit;
	unsigned int sends;		/* that might have paused */
	int owing;			/* the peer was not told of its space */
	Py_ssize_t handled;		/* of the batch that serve() has in hand */
	unsigned long long calls;	/* of handlers, by serve() */
	unsigned long long polls_hit;	/* by serve() */
	unsigned long long poll_ns;	/* likewise, hits and misses */
	struct module_state *state;
	struct channel_object *next;	/* of all in the process, for fork */
	struct channel_object **link;
} ChannelObject;

typedef struct {
	PyObject_HEAD
	ChannelObject *channel;
	struct kucomms_frame *frame;
	struct kucomms_pin pin;
	Py_ssize_t exports;
	uint32_t length;
	int active;			/* neither committed nor discarded */
	int pinned;
} ReservationObject;

typedef struct {
	PyObject_HEAD
	ChannelObject *channel;
	struct kucomms_view view;
	struct kucomms_pin pin;
	Py_ssize_t exports;
	int released;
	int pinned;
} BorrowObject;

/* ---- fork ---------------------------------------------------------------- */

static pthread_mutex_t all_lock = PTHREAD_MUTEX_INITIALIZER;
static ChannelObject *all_channels;
static unsigned long fork_generation;

static void before_fork(void)
{
	pthread_mutex_lock(&all_lock);
}

static void after_fork_parent(void)
{
	pthread_mutex_unlock(&all_lock);
}

static void fill_hole(void *at, size_t size)
{
	if (at)
		mmap(at, size, PROT_READ | PROT_WRITE,
		     MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE,
		     -1, 0);
}

/*
 * The child does not have the mappings. It gets empty pages in their place, so
 * that a view that it inherited reads zeros instead of crashing, and nothing
 * else can be mapped where a later munmap() would hit it.
 */
static void after_fork_child(void)
{
	ChannelObject *self;
	int i;

	fork_generation++;
	for (self = all_channels; self; self = self->next) {
		struct kucomms_channel *channel = self->channel;

		for (i = 0; i < 2; i++) {
			fill_hole(channel->side[i].control,
				  KUCOMMS_CONTROL_PAGES * channel->page_size);
			fill_hole(channel->side[i].data,
				  2 * channel->ring_size);
		}
	}
	pthread_mutex_unlock(&all_lock);
}

static void all_add(ChannelObject *self)
{
	pthread_mutex_lock(&all_lock);
	self->next = all_channels;
	self->link = &all_channels;
	if (all_channels)
		all_channels->link = &self->next;
	all_channels = self;
	pthread_mutex_unlock(&all_lock);
}

static void all_remove(ChannelObject *self)
{
	pthread_mutex_lock(&all_lock);
	*self->link = self->next;
	if (self->next)
		self->next->link = self->link;
	pthread_mutex_unlock(&all_lock);
}

/* ---- helpers ------------------------------------------------------------- */

/*
 * The slots of the stable ABI are a void *, a function is not; the compiler has
 * to be told that it is meant (POSIX allows it).
 */
#define SLOT(id, function) { id, (void *)(uintptr_t)(function) }
#define METHOD(name, function, flags, doc) \
	{ name, (PyCFunction)(void (*)(void))(function), flags, doc }

static int forked(const ChannelObject *self)
{
	return self->generation != fork_generation;
}

static void unmap_if_unused(ChannelObject *self)
{
	if (self->unmap_wanted && !self->users && self->mapped) {
		self->mapped = 0;
		all_remove(self);
		kucomms_channel_unmap(self->channel);
	}
}

/* Call back, whatever exception is under way; @callback may be cleared in it. */
static void call_back(PyObject *callback)
{
	PyObject *result, *type, *value, *traceback;

	if (!callback)
		return;
	Py_INCREF(callback);
	PyErr_Fetch(&type, &value, &traceback);
	result = PyObject_CallNoArgs(callback);
	if (result)
		Py_DECREF(result);
	else
		PyErr_WriteUnraisable(callback);
	PyErr_Restore(type, value, traceback);
	Py_DECREF(callback);
}

/* 0 or errno. Never blocks, but for a peer of the same user that wants it to. */
static int write_eventfd(int fd)
{
	static const uint64_t bell = 1;

	while (write(fd, &bell, sizeof(bell)) < 0) {
		if (errno == EAGAIN)	/* rung often enough */
			break;
		if (errno != EINTR)
			return errno;
	}
	return 0;
}

static void ring_doorbell(ChannelObject *self)
{
	if (self->eventfd >= 0)
		write_eventfd(self->eventfd);
	else
		call_back(self->doorbell);
}

/*
 * Around what touches the ring and may run Python code (allocating can run the
 * garbage collector): the pages stay mapped until the matching end_use().
 */
static void begin_use(ChannelObject *self)
{
	self->users++;
}

static void end_use(ChannelObject *self)
{
	self->users--;
	unmap_if_unused(self);
}

static enum status status_of(int err)
{
	switch (err) {
	case -EAGAIN:
		return FULL;
	case -EMSGSIZE:
		return TOO_LARGE;
	case -EPERM:
		return OUT_OF_TURN;
	case -ENOBUFS:
		return TOO_MANY_LOANS;
	default:
		return PROTOCOL;
	}
}

static enum status may_send(const ChannelObject *self, int any_thread)
{
	if (forked(self))
		return FORKED;
	if (!self->open)
		return CLOSED;
	if (!any_thread && self->owner != PyThread_get_thread_ident())
		return WRONG_THREAD;
	return OK;
}

static enum status may_receive(const ChannelObject *self)
{
	if (forked(self))
		return FORKED;
	if (!self->attached || !self->mapped)
		return CLOSED;
	if (self->owner != PyThread_get_thread_ident())
		return WRONG_THREAD;
	return OK;
}

static PyObject *from_status(enum status status)
{
	return PyLong_FromLong(status);
}

static int check_args(const char *name, Py_ssize_t got, Py_ssize_t wanted)
{
	if (got == wanted)
		return 0;
	PyErr_Format(PyExc_TypeError, "%s takes %zd arguments, got %zd", name,
		     wanted, got);
	return -1;
}

/* ---- what is to be sent -------------------------------------------------- */

struct outgoing {
	const void *data;
	Py_ssize_t length;
	uint64_t type;
	uint64_t id;
	uint64_t user_value;
	uint32_t flags;
	PyObject *owner;	/* keeps data alive: bytes, or NULL with view */
	Py_buffer view;
	int has_view;
};

static void outgoing_clear(struct outgoing *out)
{
	if (out->has_view)
		PyBuffer_Release(&out->view);
	out->has_view = 0;
	Py_CLEAR(out->owner);
}

static int outgoing_data(struct outgoing *out, PyObject *data)
{
	if (PyBytes_CheckExact(data)) {
		char *at;

		if (PyBytes_AsStringAndSize(data, &at, &out->length))
			return -1;
		out->data = at;
		out->owner = Py_NewRef(data);
		return 0;
	}
	if (PyObject_GetBuffer(data, &out->view, PyBUF_SIMPLE))
		return -1;
	out->has_view = 1;
	out->data = out->view.buf;
	out->length = out->view.len;
	return 0;
}

static int header_value(PyObject *object, uint64_t *value)
{
	if (object == Py_None)
		return 0;
	*value = PyLong_AsUnsignedLongLong(object);
	return *value == (uint64_t)-1 && PyErr_Occurred() ? -1 : 0;
}

static int header_attribute(PyObject *message, PyObject *name, uint64_t *value)
{
	PyObject *object = PyObject_GetAttr(message, name);
	int err;

	if (!object)
		return -1;
	err = header_value(object, value);
	Py_DECREF(object);
	return err;
}

/* Read @data (bytes-like or a Message) and what overrides its header. */
static int outgoing_read(struct module_state *state, struct outgoing *out,
			 PyObject *data, PyObject *type, PyObject *id,
			 PyObject *user_value)
{
	memset(out, 0, sizeof(*out));
	if (PyBytes_CheckExact(data) || !state->message_type ||
	    !PyObject_TypeCheck(data, state->message_type)) {
		if (outgoing_data(out, data))
			goto error;
	} else {
		PyObject *inner = PyObject_GetAttr(data, state->name_data);
		int err;

		if (!inner)
			return -1;
		err = outgoing_data(out, inner);
		Py_DECREF(inner);
		if (err ||
		    header_attribute(data, state->name_type, &out->type) ||
		    header_attribute(data, state->name_id, &out->id) ||
		    header_attribute(data, state->name_user_value,
				     &out->user_value))
			goto error;
		if (PyObject_TypeCheck(data, state->token_type))
			out->flags = KUCOMMS_FLAG_TOKEN;
	}
	if (header_value(type, &out->type) || header_value(id, &out->id) ||
	    header_value(user_value, &out->user_value))
		goto error;
	return 0;
error:
	outgoing_clear(out);
	return -1;
}

/* Put it into the ring, without the doorbell. The GIL is the sender's lock. */
static enum status outgoing_put(ChannelObject *self, struct outgoing *out,
				uint32_t flags)
{
	int err;

	if ((uint64_t)out->length > UINT32_MAX)
		return TOO_LARGE;
	if (out->flags && (flags || out->length ||
			   !kucomms_channel_has_turns(self->channel)))
		return NO_TOKEN;
	err = kucomms_channel_put_locked(self->channel, out->data,
					 (uint32_t)out->length,
					 flags | out->flags, out->type, out->id,
					 out->user_value);
	return err ? status_of(err) : OK;
}

/* ---- Reservation --------------------------------------------------------- */

static void reservation_unpin(ReservationObject *self)
{
	ChannelObject *channel = self->channel;

	if (!self->pinned)
		return;
	self->pinned = 0;
	channel->loans--;
	channel->users--;
	if (!forked(channel))
		kucomms_channel_unpin_tx(channel->channel, &self->pin);
	unmap_if_unused(channel);
}

static void reservation_drop(ReservationObject *self)
{
	if (!self->active)
		return;
	self->active = 0;
	if (!forked(self->channel) &&
	    kucomms_channel_discard(self->channel->channel, self->frame,
				    self->length))
		ring_doorbell(self->channel);
	if (!self->exports)
		reservation_unpin(self);
}

PyDoc_STRVAR(reservation_commit_doc,
"commit() -> status\n\nSend the message. EMPTY when a view of its data is still\n"
"alive: then it was discarded, and its bytes stay unused until the view dies.");

static PyObject *reservation_commit(ReservationObject *self, PyObject *unused)
{
	ChannelObject *channel = self->channel;

	(void)unused;
	if (forked(channel))
		return from_status(FORKED);
	if (!self->active)
		return from_status(CLOSED);
	if (self->exports) {
		reservation_drop(self);
		return from_status(EMPTY);
	}
	if (!channel->open) {
		reservation_drop(self);
		return from_status(CLOSED);
	}
	self->active = 0;
	begin_use(channel);
	kucomms_ring_commit(self->frame, self->length, 0);
	reservation_unpin(self);
	if (kucomms_channel_publish(channel->channel))
		ring_doorbell(channel);
	end_use(channel);
	return from_status(OK);
}

PyDoc_STRVAR(reservation_discard_doc,
"discard() -> bool\n\nDo not send the message. False when a view is still alive.");

static PyObject *reservation_discard(ReservationObject *self, PyObject *unused)
{
	(void)unused;
	reservation_drop(self);
	return PyBool_FromLong(!self->exports);
}

static int reservation_getbuffer(ReservationObject *self, Py_buffer *view,
				 int flags)
{
	if (!self->active) {
		PyErr_SetString(PyExc_BufferError, "the loan is over");
		return -1;
	}
	if (PyBuffer_FillInfo(view, (PyObject *)self, self->frame + 1,
			      (Py_ssize_t)self->length, 0, flags))
		return -1;
	self->exports++;
	return 0;
}

static void reservation_releasebuffer(ReservationObject *self, Py_buffer *view)
{
	(void)view;
	if (!--self->exports && !self->active) {
		reservation_unpin(self);
		call_back(self->channel->room);
	}
}

static void reservation_dealloc(ReservationObject *self)
{
	PyTypeObject *type = Py_TYPE(self);

	if (self->channel) {
		reservation_drop(self);
		Py_DECREF(self->channel);
	}
	PyObject_Free(self);
	Py_DECREF(type);
}

static PyMethodDef reservation_methods[] = {
	METHOD("commit", reservation_commit, METH_NOARGS,
	       reservation_commit_doc),
	METHOD("discard", reservation_discard, METH_NOARGS,
	       reservation_discard_doc),
	{ NULL, NULL, 0, NULL },
};

static PyType_Slot reservation_slots[] = {
	SLOT(Py_tp_dealloc, reservation_dealloc),
	SLOT(Py_tp_methods, reservation_methods),
	SLOT(Py_bf_getbuffer, reservation_getbuffer),
	SLOT(Py_bf_releasebuffer, reservation_releasebuffer),
	{ 0, NULL },
};

static PyType_Spec reservation_spec = {
	.name = "kucomms._core._ring.Reservation",
	.basicsize = sizeof(ReservationObject),
	.flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION,
	.slots = reservation_slots,
};

/* ---- Borrow -------------------------------------------------------------- */

/* Give back what was read; remember, if @lazily, who was not told. */
static void release_space(ChannelObject *self, int lazily)
{
	int must_ring;

	if (lazily)
		must_ring = kucomms_channel_release_lazily(self->channel);
	else
		must_ring = kucomms_channel_release(self->channel);
	if (must_ring == -EAGAIN)
		self->owing = 1;
	else if (must_ring)
		ring_doorbell(self);
}

static void borrow_unpin(BorrowObject *self, int lazily)
{
	ChannelObject *channel = self->channel;

	if (!self->pinned)
		return;
	self->pinned = 0;
	if (!forked(channel)) {
		kucomms_channel_unpin_rx(&self->pin);
		release_space(channel, lazily);
	}
	channel->users--;
	unmap_if_unused(channel);
}

PyDoc_STRVAR(borrow_release_doc,
"release(lazily=False) -> bool\n\nGive the bytes back. False when a view is still\n"
"alive: they are given back when it dies. lazily: as in Channel.receive().");

static PyObject *borrow_release(BorrowObject *self, PyObject *const *args,
				Py_ssize_t nargs)
{
	self->released = 1;
	if (self->exports)
		Py_RETURN_FALSE;
	borrow_unpin(self, nargs > 0 && args[0] == Py_True);
	Py_RETURN_TRUE;
}

static int borrow_getbuffer(BorrowObject *self, Py_buffer *view, int flags)
{
	if (self->released) {
		PyErr_SetString(PyExc_BufferError, "the borrow is over");
		return -1;
	}
	if (PyBuffer_FillInfo(view, (PyObject *)self, (void *)self->view.data,
			      (Py_ssize_t)self->view.length, 1, flags))
		return -1;
	self->exports++;
	return 0;
}

static void borrow_releasebuffer(BorrowObject *self, Py_buffer *view)
{
	(void)view;
	if (!--self->exports && self->released)
		borrow_unpin(self, 0);
}

static void borrow_dealloc(BorrowObject *self)
{
	PyTypeObject *type = Py_TYPE(self);

	if (self->channel) {
		borrow_unpin(self, 0);
		Py_DECREF(self->channel);
	}
	PyObject_Free(self);
	Py_DECREF(type);
}

static PyMethodDef borrow_methods[] = {
	METHOD("release", borrow_release, METH_FASTCALL, borrow_release_doc),
	{ NULL, NULL, 0, NULL },
};

static PyMemberDef borrow_members[] = {
	{ "type", T_ULONGLONG, offsetof(BorrowObject, view.type), READONLY,
	  NULL },
	{ "id", T_ULONGLONG, offsetof(BorrowObject, view.id), READONLY, NULL },
	{ "user_value", T_ULONGLONG, offsetof(BorrowObject, view.user_value),
	  READONLY, NULL },
	{ "flags", T_UINT, offsetof(BorrowObject, view.flags), READONLY, NULL },
	{ NULL, 0, 0, 0, NULL },
};

static PyType_Slot borrow_slots[] = {
	SLOT(Py_tp_dealloc, borrow_dealloc),
	SLOT(Py_tp_methods, borrow_methods),
	SLOT(Py_tp_members, borrow_members),
	SLOT(Py_bf_getbuffer, borrow_getbuffer),
	SLOT(Py_bf_releasebuffer, borrow_releasebuffer),
	{ 0, NULL },
};

static PyType_Spec borrow_spec = {
	.name = "kucomms._core._ring.Borrow",
	.basicsize = sizeof(BorrowObject),
	.flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION,
	.slots = borrow_slots,
};

/* ---- Channel ------------------------------------------------------------- */

static PyObject *channel_new(PyTypeObject *type, PyObject *args,
			     PyObject *kwargs)
{
	unsigned long long address;
	ChannelObject *self;
	PyObject *module;

	if (kwargs && PyDict_Size(kwargs)) {
		PyErr_SetString(PyExc_TypeError, "no keyword arguments");
		return NULL;
	}
	if (!PyArg_ParseTuple(args, "K", &address))
		return NULL;
	module = PyType_GetModule(type);
	if (!module)
		return NULL;
	self = (ChannelObject *)PyType_GenericAlloc(type, 0);
	if (!self)
		return NULL;
	self->state = PyModule_GetState(module);
	self->channel = (struct kucomms_channel *)(uintptr_t)address;
	self->generation = fork_generation;
	self->loan_limit = 64;
	self->mapped = 1;
	self->eventfd = -1;
	all_add(self);
	return (PyObject *)self;
}

static int channel_traverse(ChannelObject *self, visitproc visit, void *arg)
{
	Py_VISIT(Py_TYPE(self));
	Py_VISIT(self->doorbell);
	Py_VISIT(self->room);
	Py_VISIT(self->requests);
	Py_VISIT(self->frames);
	return 0;
}

static int channel_clear(ChannelObject *self)
{
	Py_CLEAR(self->doorbell);
	Py_CLEAR(self->room);
	Py_CLEAR(self->requests);
	Py_CLEAR(self->frames);
	return 0;
}

static void channel_dealloc(ChannelObject *self)
{
	PyTypeObject *type = Py_TYPE(self);

	PyObject_GC_UnTrack(self);
	Py_CLEAR(self->doorbell);
	Py_CLEAR(self->room);
	Py_CLEAR(self->requests);
	Py_CLEAR(self->frames);
	if (self->mapped) {
		all_remove(self);
		kucomms_channel_unmap(self->channel);
	}
	if (self->channel) {
		if (!forked(self))
			pthread_mutex_destroy(&self->channel->lock);
		free(self->channel);
	}
	PyObject_GC_Del(self);
	Py_DECREF(type);
}

PyDoc_STRVAR(channel_attach_doc,
"attach(doorbell)\n\nMake the calling thread the channel's, and open it.\n"
"doorbell() is called, from any thread, when the peer has to be woken. It may be the\n"
"number of an eventfd instead, to be written; then mute() comes before it is closed.");

static PyObject *channel_attach(ChannelObject *self, PyObject *doorbell)
{
	PyObject *old = self->doorbell;

	if (PyLong_Check(doorbell)) {
		self->eventfd = (int)PyLong_AsLong(doorbell);
		if (self->eventfd == -1 && PyErr_Occurred())
			return NULL;
	}
	self->doorbell = Py_NewRef(doorbell);
	Py_XDECREF(old);
	self->owner = PyThread_get_thread_ident();
	self->attached = 1;
	self->open = 1;
	Py_RETURN_NONE;
}

PyDoc_STRVAR(channel_mute_doc,
"mute()\n\nRing no more.");

static PyObject *channel_mute(ChannelObject *self, PyObject *unused)
{
	(void)unused;
	self->eventfd = -1;
	Py_CLEAR(self->doorbell);
	Py_RETURN_NONE;
}

PyDoc_STRVAR(channel_on_room_doc,
"on_room(callback)\n\ncallback() is called, from any thread, when bytes can be\n"
"reserved again that a dropped loan had kept: the peer does not ring for those.");

static PyObject *channel_on_room(ChannelObject *self, PyObject *callback)
{
	PyObject *old = self->room;

	self->room = Py_NewRef(callback);
	Py_XDECREF(old);
	Py_RETURN_NONE;
}

PyDoc_STRVAR(channel_expect_doc,
"expect(requests)\n\nFrom now on only what answers a key of this dict is a reply, and\n"
"every other one a message. For a channel with turns: it brings the turn, so it must\n"
"not be dropped.");

static PyObject *channel_expect(ChannelObject *self, PyObject *requests)
{
	PyObject *old = self->requests;

	if (!PyDict_Check(requests)) {
		PyErr_SetString(PyExc_TypeError, "not a dict");
		return NULL;
	}
	self->requests = Py_NewRef(requests);
	Py_XDECREF(old);
	Py_RETURN_NONE;
}

PyDoc_STRVAR(channel_on_frame_doc,
"on_frame(callback)\n\ncallback(kind, flags, buffers, data, type, id, user_value) is called for\n"
"what the peer sends that is no plain message: data is all of it, and begins with that\n"
"many struct kucomms_carried. It returns a Message to be received, None for nothing, or\n"
"False: the peer broke the rules. Without a callback it always did.");

static PyObject *channel_on_frame(ChannelObject *self, PyObject *callback)
{
	PyObject *old = self->frames;

	self->frames = Py_NewRef(callback);
	Py_XDECREF(old);
	Py_RETURN_NONE;
}

PyDoc_STRVAR(channel_hold_turn_doc,
"hold_turn()\n\nA message was taken that nobody has received yet: the turn that it has\n"
"brought waits for take_turn(). Nothing without turns.");

static PyObject *channel_hold_turn(ChannelObject *self, PyObject *unused)
{
	struct kucomms_channel *channel = self->channel;

	(void)unused;
	/* A thread may have sent already: then there is none. */
	if (kucomms_channel_has_turns(channel) &&
	    kucomms_channel_has_turn(channel)) {
		self->holds_turn = 1;
		kucomms_channel_set_turn(channel, KUCOMMS_TURN_THEIRS);
	}
	Py_RETURN_NONE;
}

PyDoc_STRVAR(channel_take_turn_doc,
"take_turn()\n\nThe message of hold_turn() is received.");

static PyObject *channel_take_turn(ChannelObject *self, PyObject *unused)
{
	(void)unused;
	if (self->holds_turn) {
		self->holds_turn = 0;
		kucomms_channel_set_turn(self->channel, KUCOMMS_TURN_OURS);
	}
	Py_RETURN_NONE;
}

/* Is this a reply, that somebody waits for? See expect(). */
static int is_reply(ChannelObject *self, const struct kucomms_view *view)
{
	PyObject *id;
	int waited;

	if (!(view->flags & KUCOMMS_FLAG_REPLY) || !self->requests)
		return view->flags & KUCOMMS_FLAG_REPLY;
	id = PyLong_FromUnsignedLongLong(view->id);
	waited = id ? PyDict_Contains(self->requests, id) : -1;
	Py_XDECREF(id);
	if (waited < 0)		/* no memory: it can be received at least */
		PyErr_Clear();
	return waited > 0;
}

static PyObject *send_from(ChannelObject *self, PyObject *const *args,
			   uint32_t flags, int any_thread)
{
	enum status status = may_send(self, any_thread);
	struct outgoing out;

	if (status != OK)
		return from_status(status);
	if (outgoing_read(self->state, &out, args[0], args[1], args[2], args[3]))
		return NULL;
	/* reading the arguments may have run Python code that closed us */
	if (!PyBytes_CheckExact(args[0]))
		status = may_send(self, any_thread);
	if (status == OK) {
		begin_use(self);
		status = outgoing_put(self, &out, flags);
		if (status == OK && kucomms_channel_publish(self->channel))
			ring_doorbell(self);
		end_use(self);
	}
	outgoing_clear(&out);
	return from_status(status);
}

PyDoc_STRVAR(channel_send_doc,
"send(data, type, id, user_value) -> status\n\n"
"data: bytes-like or Message; None for a header value: the Message's, or 0.\n"
"OK, FULL, TOO_LARGE, CLOSED, PROTOCOL, WRONG_THREAD, FORKED, OUT_OF_TURN or NO_TOKEN.");

static PyObject *channel_send(ChannelObject *self, PyObject *const *args,
			      Py_ssize_t nargs)
{
	return check_args("send", nargs, 4) ? NULL : send_from(self, args, 0, 0);
}

PyDoc_STRVAR(channel_send_paced_doc,
"send_paced(data, type, id, user_value) -> status\n\n"
"As send, but now and then the answer is PAUSE: nothing was sent, give the loop a\n"
"turn and send.");

static PyObject *channel_send_paced(ChannelObject *self, PyObject *const *args,
				    Py_ssize_t nargs)
{
	if (check_args("send_paced", nargs, 4))
		return NULL;
	if (++self->sends % PACE == 0 && may_send(self, 0) == OK)
		return from_status(PAUSE);
	return send_from(self, args, 0, 0);
}

PyDoc_STRVAR(channel_send_reply_doc, "As send, with the reply flag.");

static PyObject *channel_send_reply(ChannelObject *self, PyObject *const *args,
				    Py_ssize_t nargs)
{
	return check_args("send_reply", nargs, 4) ? NULL :
	       send_from(self, args, KUCOMMS_FLAG_REPLY, 0);
}

PyDoc_STRVAR(channel_send_threadsafe_doc, "As send, from any thread.");

static PyObject *channel_send_threadsafe(ChannelObject *self,
					 PyObject *const *args,
					 Py_ssize_t nargs)
{
	return check_args("send_threadsafe", nargs, 4) ? NULL :
	       send_from(self, args, 0, 1);
}

PyDoc_STRVAR(channel_send_front_doc,
"send_front(data, type, id, user_value, front, kind, flags) -> status\n\n"
"As send, of another kind; front: the bytes that it begins with.");

static PyObject *channel_send_front(ChannelObject *self, PyObject *const *args,
				    Py_ssize_t nargs)
{
	enum status status;
	struct outgoing out;
	unsigned long kind, flags;
	Py_ssize_t length;
	char *front;
	int err;

	if (check_args("send_front", nargs, 7))
		return NULL;
	kind = PyLong_AsUnsignedLong(args[5]);
	flags = PyLong_AsUnsignedLong(args[6]);
	if (PyErr_Occurred() ||
	    PyBytes_AsStringAndSize(args[4], &front, &length) ||
	    outgoing_read(self->state, &out, args[0], args[1], args[2], args[3]))
		return NULL;
	if (kind == KUCOMMS_KIND_BUFFER)
		kind = kucomms_frame_kind((uint32_t)((size_t)length /
					  sizeof(struct kucomms_carried)));
	status = may_send(self, 0);
	if (status == OK && (uint64_t)out.length > UINT32_MAX)
		status = TOO_LARGE;
	if (status == OK && out.flags)
		status = NO_TOKEN;
	if (status == OK) {
		begin_use(self);
		err = kucomms_channel_put_front_locked(self->channel,
						       (uint32_t)kind,
						       (uint32_t)flags, front,
						       (uint32_t)length,
						       out.data,
						       (uint32_t)out.length,
						       out.type, out.id,
						       out.user_value);
		status = err ? status_of(err) : OK;
		if (status == OK && kucomms_channel_publish(self->channel))
			ring_doorbell(self);
		end_use(self);
	}
	outgoing_clear(&out);
	return from_status(status);
}

PyDoc_STRVAR(channel_send_many_doc,
"send_many(messages, start) -> (count, status)\n\n"
"Send the items of a list or tuple from index start on, until one cannot be\n"
"sent; count were sent, status says what is with the next one.");

static PyObject *channel_send_many(ChannelObject *self, PyObject *const *args,
				   Py_ssize_t nargs)
{
	enum status status = OK;
	Py_ssize_t start, at;

	if (check_args("send_many", nargs, 2))
		return NULL;
	start = PyLong_AsSsize_t(args[1]);
	if (start == -1 && PyErr_Occurred())
		return NULL;
	status = may_send(self, 0);
	if (status != OK)
		return Py_BuildValue("ni", (Py_ssize_t)0, (int)status);
	begin_use(self);
	for (at = start; status == OK; at++) {
		Py_ssize_t size = PySequence_Size(args[0]);
		struct outgoing out;
		PyObject *item;
		int err;

		if (size >= 0 && at >= size)
			break;
		item = size < 0 ? NULL : PySequence_GetItem(args[0], at);
		err = !item || outgoing_read(self->state, &out, item, Py_None,
					     Py_None, Py_None);
		Py_XDECREF(item);
		if (err) {
			/* what was sent comes first; the next call will raise */
			if (at == start) {
				end_use(self);
				return NULL;
			}
			PyErr_Clear();
			break;
		}
		status = may_send(self, 0);
		if (status == OK)
			status = outgoing_put(self, &out, 0);
		outgoing_clear(&out);
		if (status != OK)
			break;
	}
	if (at > start && kucomms_channel_publish(self->channel))
		ring_doorbell(self);
	end_use(self);
	return Py_BuildValue("ni", at - start, (int)status);
}

PyDoc_STRVAR(channel_reserve_doc,
"reserve(size, type, id, user_value) -> Reservation or status");

static PyObject *channel_reserve(ChannelObject *self, PyObject *const *args,
				 Py_ssize_t nargs)
{
	uint64_t type = 0, id = 0, user_value = 0;
	struct kucomms_frame *frame;
	ReservationObject *loan;
	enum status status;
	Py_ssize_t size;
	int err;

	if (check_args("reserve", nargs, 4))
		return NULL;
	status = may_send(self, 0);
	if (status != OK)
		return from_status(status);
	size = PyLong_AsSsize_t(args[0]);
	if (size == -1 && PyErr_Occurred())
		return NULL;
	if (size < 0) {
		PyErr_SetString(PyExc_OverflowError, "negative size");
		return NULL;
	}
	if (header_value(args[1], &type) || header_value(args[2], &id) ||
	    header_value(args[3], &user_value))
		return NULL;
	if ((uint64_t)size > UINT32_MAX)
		return from_status(TOO_LARGE);
	if (self->loans >= self->loan_limit)
		return from_status(TOO_MANY_LOANS);
	loan = PyObject_New(ReservationObject, self->state->reservation_type);
	if (!loan)
		return NULL;
	loan->channel = NULL;
	loan->exports = 0;
	loan->active = 0;
	loan->pinned = 0;
	err = kucomms_channel_reserve_locked(self->channel, (uint32_t)size,
					     &frame, &loan->pin);
	if (err) {
		Py_DECREF(loan);
		return from_status(status_of(err));
	}
	frame->type = type;
	frame->id = id;
	frame->user_value = user_value;
	loan->channel = (ChannelObject *)Py_NewRef((PyObject *)self);
	loan->frame = frame;
	loan->length = (uint32_t)size;
	loan->active = 1;
	loan->pinned = 1;
	self->loans++;
	self->users++;
	return (PyObject *)loan;
}

PyDoc_STRVAR(channel_receive_doc,
"receive(limit, budget, messages, replies, first) -> status\n\n"
"Append up to limit messages of together at most budget bytes of the ring to\n"
"the list messages, those with the reply flag to the list replies; with first, the\n"
"first message however large it is. OK also when there were none; MORE when so much\n"
"had to be skipped that others shall have a turn first, or something was taken that is\nno message for the user: then there may be messages\n"
"behind it; PROTOCOL after what came before the fault.\n\n"
"serve() receives lazily: MORE when limit or budget has ended it, too; and the peer may\n"
"not be told at once that there is space: when owing is true then, call\n"
"wake_producer() before the reading stops.");

/* A Message of what is in the ring; runs Python code. */
static PyObject *message_from(ChannelObject *self,
			      const struct kucomms_view *view)
{
	PyObject *maker = (PyObject *)self->state->message_type;
	PyObject *data, *type, *id, *user_value, *message = NULL;

	if (view->flags & KUCOMMS_FLAG_TOKEN)
		maker = (PyObject *)self->state->token_type;
	data = PyBytes_FromStringAndSize((const char *)view->data,
					 (Py_ssize_t)view->length);
	if (!data)
		return NULL;
	/* The defaults are zeros: nothing to make and to pass. */
	if (!(view->type | view->id | view->user_value)) {
		message = PyObject_CallFunctionObjArgs(maker, data, NULL);
		Py_DECREF(data);
		return message;
	}
	type = PyLong_FromUnsignedLongLong(view->type);
	id = PyLong_FromUnsignedLongLong(view->id);
	user_value = PyLong_FromUnsignedLongLong(view->user_value);
	if (type && id && user_value)
		message = PyObject_CallFunctionObjArgs(maker, data, type, id,
						       user_value, NULL);
	Py_XDECREF(user_value);
	Py_XDECREF(id);
	Py_XDECREF(type);
	Py_DECREF(data);
	return message;
}

/*
 * What is no plain message goes to the callback of on_frame(), which gets a copy: the
 * peer can change what is in the ring. It may run anything. Return: a Message, None
 * when there is none for the user, NULL when the peer broke the rules or, with an
 * exception, there is no memory.
 */
static PyObject *take_front(ChannelObject *self, const struct kucomms_view *view)
{
	PyObject *data, *result = NULL, *callback = self->frames;

	data = PyBytes_FromStringAndSize((const char *)view->data,
					 (Py_ssize_t)view->length);
	if (!data)
		return NULL;
	kucomms_channel_advance_front(self->channel, view);
	if (callback) {
		Py_INCREF(callback);
		result = PyObject_CallFunction(callback, "IIIOKKK",
					       (unsigned int)view->kind,
					       (unsigned int)view->flags,
					       (unsigned int)view->buffers,
					       data,
					       (unsigned long long)view->type,
					       (unsigned long long)view->id,
					       (unsigned long long)
					       view->user_value);
		if (!result)	/* a bug; but that nothing can be trusted is true */
			PyErr_WriteUnraisable(callback);
		Py_DECREF(callback);
	}
	Py_DECREF(data);
	if (result == Py_False)
		Py_CLEAR(result);
	if (!result)
		kucomms_channel_fault(self->channel, -EPROTO);
	return result;
}

/* See receive(); -1 with an exception. may_receive() has said OK. */
static int receive_batch(ChannelObject *self, Py_ssize_t limit,
			 long long budget, PyObject *messages,
			 PyObject *replies, int first, int lazily)
{
	struct kucomms_channel *channel = self->channel;
	int failed = 0, skipped = 0, more = 0, taken = 0, others = 0;
	enum status status = OK;

	/*
	 * Making a message can run the garbage collector and so anything, also
	 * what closes this channel or receives from it.
	 */
	begin_use(self);
	self->receiving = 1;
	for (; limit > 0 && self->attached; limit--) {
		struct kucomms_view view;
		PyObject *message;
		int err, reply;

		err = kucomms_channel_peek(channel, &view);
		if (err == -EAGAIN)
			break;
		if (err == KUCOMMS_SKIPPED) {
			skipped = 1;
			break;
		}
		if (err) {
			status = PROTOCOL;
			break;
		}
		if (view.kind != KUCOMMS_KIND_MESSAGE) {
			if (!is_reply(self, &view))
				view.flags &= ~(uint32_t)KUCOMMS_FLAG_REPLY;
			if (kucomms_kind_is_message(view.kind, view.flags) &&
			    !(view.flags & KUCOMMS_FLAG_REPLY)) {
				budget -= (long long)
					  kucomms_frame_span(view.length);
				if (budget < 0 && !(first && !taken)) {
					more = 1;
					break;
				}
				taken = 1;
			}
			message = take_front(self, &view);
			if (!message) {
				failed = PyErr_Occurred() != NULL;
				status = PROTOCOL;
				break;
			}
			others |= message == Py_None;
			failed = message != Py_None &&
				 PyList_Append(messages, message);
			Py_DECREF(message);
			if (failed)
				break;
			continue;
		}
		/* Replies cost nothing: somebody waits for them. */
		reply = is_reply(self, &view);
		if (!reply)
			budget -= (long long)kucomms_frame_span(view.length);
		if (budget < 0 && !reply && !(first && !taken)) {
			more = 1;
			break;
		}
		message = message_from(self, &view);
		failed = !message ||
			 PyList_Append(reply ? replies : messages, message);
		Py_XDECREF(message);
		if (failed)
			break;
		kucomms_channel_advance(channel, &view);
		taken = 1;
	}
	self->receiving = 0;
	release_space(self, lazily);
	end_use(self);
	if (failed)
		return -1;
	if (skipped || (lazily && status == OK && (more || limit == 0)) ||
	    (!lazily && status == OK && others))
		return MORE;
	return status;
}

static PyObject *channel_receive(ChannelObject *self, PyObject *const *args,
				 Py_ssize_t nargs)
{
	enum status status;
	Py_ssize_t limit;
	long long budget;
	int result;

	if (check_args("receive", nargs, 5))
		return NULL;
	limit = PyLong_AsSsize_t(args[0]);
	if (limit == -1 && PyErr_Occurred())
		return NULL;
	budget = PyLong_AsLongLong(args[1]);
	if (budget == -1 && PyErr_Occurred())
		return NULL;
	status = may_receive(self);
	if (status != OK || self->receiving)
		return from_status(status);
	result = receive_batch(self, limit, budget, args[2], args[3],
			       args[4] == Py_True, 0);
	return result < 0 ? NULL : from_status((enum status)result);
}

/* ---- serving: receiving and handling, over and over ---------------------- */

static uint64_t now_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static int any_front(struct kucomms_channel *const *channels, unsigned int count)
{
	unsigned int i;

	for (i = 0; i < count; i++)
		if (kucomms_ring_has_front(&channels[i]->rx))
			return 1;
	return 0;
}

/*
 * Spin until there is something, at most @limit ns. The channels are in use.
 * A busy peer answers within a microsecond, which is less than it takes to get
 * the GIL back from a busy thread; so only then it is dropped.
 */
static int spin(struct kucomms_channel *const *channels, unsigned int count,
		uint64_t limit, uint64_t *spent)
{
	uint64_t begin = now_ns();
	unsigned int look;
	int hit = 0;

	for (look = 0; look < POLL_HELD && !hit; look++) {
		hit = any_front(channels, count);
		if (!hit)
			kucomms_cpu_relax();
	}
	if (!hit) {
		Py_BEGIN_ALLOW_THREADS
		hit = kucomms_channels_poll(channels, count, limit);
		Py_END_ALLOW_THREADS
	}
	*spent = now_ns() - begin;
	return hit;
}

/*
 * Hand messages[handled:] to the handler. Return: NULL with an exception, None
 * when all are handled, False after @deadline, or what the handler waits with.
 */
static PyObject *handle_batch(ChannelObject *self, PyObject *handler,
			      PyObject *link, PyObject *messages,
			      uint64_t deadline)
{
	/* A handler that closes its link clears the list. */
	while (self->handled < PyList_Size(messages)) {
		PyObject *message = PyList_GetItem(messages, self->handled);
		PyObject *result, *yielded = NULL;

		Py_INCREF(message);
		self->handled++;
		self->calls++;
		result = PyObject_CallFunctionObjArgs(handler, message, link,
						      NULL);
		Py_DECREF(message);
		if (!result)
			return NULL;
		if (Py_TYPE(result) == self->state->coroutine_type) {
			/* For most handlers the first step is the last one. */
			switch (PyIter_Send(result, Py_None, &yielded)) {
			case PYGEN_RETURN:
				Py_DECREF(yielded);
				break;
			case PYGEN_NEXT:
				return Py_BuildValue("(NN)", result, yielded);
			case PYGEN_ERROR:
				Py_DECREF(result);
				return NULL;
			}
		} else if (result != Py_None) {
			return Py_BuildValue("(NO)", result, Py_None);
		}
		Py_DECREF(result);
		if (self->calls % GLANCE == 0 && now_ns() >= deadline)
			Py_RETURN_FALSE;
	}
	Py_RETURN_NONE;
}

PyDoc_STRVAR(channel_serve_doc,
"serve(handler, link, messages, replies, limit, budget, deadline, poll, poll_until,\n"
"      others, events, inbox) -> status or (result, yielded)\n\n"
"Call handler(message, link) for what is in the list messages already and then for\n"
"what can be received lazily, batch by batch of at most limit messages, until\n\n"
"OK: nothing is left, also after polling for poll nanoseconds (0: no polling; none is\n"
"begun after poll_until). MORE: there may be more, but limit is 0, much was skipped, or\n"
"something is in others, events, inbox or replies; then also in messages. PAUSE: the same within a batch, time.monotonic() has passed\n"
"deadline. What receive() answers else, with messages to be handled first.\n"
"(coroutine, yielded): the handler wants to wait, and has yielded this.\n"
"(result, None): it has returned something else, perhaps to be awaited.\n\n"
"The caller looks after replies and, at the end, owing, and calls again. Raises\n"
"what the handler raises; the next call goes on with the message after it.");

static PyObject *channel_serve(ChannelObject *self, PyObject *const *args,
			       Py_ssize_t nargs)
{
	PyObject *messages, *replies, *result;
	double deadline_s, poll_until_s;
	uint64_t deadline, spent;
	unsigned long poll;
	Py_ssize_t limit;
	long long budget;
	int status, hit;

	if (check_args("serve", nargs, 12))
		return NULL;
	messages = args[2];
	replies = args[3];
	limit = PyLong_AsSsize_t(args[4]);
	budget = PyLong_AsLongLong(args[5]);
	deadline_s = PyFloat_AsDouble(args[6]);
	poll = PyLong_AsUnsignedLong(args[7]);
	poll_until_s = PyFloat_AsDouble(args[8]);
	if (PyErr_Occurred())
		return NULL;
	deadline = deadline_s < 1e9 ? (uint64_t)(deadline_s * 1e9) : UINT64_MAX;
	for (;;) {
		if (PyList_Size(messages)) {
			result = handle_batch(self, args[0], args[1], messages,
					      deadline);
			if (result != Py_None && result != Py_False)
				return result;
			Py_DECREF(result);
			if (result == Py_False)
				return from_status(PAUSE);
			if (PyList_SetSlice(messages, 0, PY_SSIZE_T_MAX, NULL))
				return NULL;
			self->handled = 0;
			if (PyObject_Size(args[9]) || PyObject_Size(args[10]))
				return from_status(MORE);
		}
		/* What was taken out of the ring meanwhile is older. */
		if (!limit || PyObject_Size(args[11]))
			return from_status(MORE);
		status = may_receive(self);
		if (status != OK)
			return from_status(status);
		if (self->receiving)
			return from_status(MORE);
		status = receive_batch(self, limit, budget, messages, replies,
				       1, 1);
		if (status < 0)
			return NULL;
		if ((status != OK && status != MORE) || PyList_Size(replies))
			return from_status(status == OK ? MORE : status);
		if (PyList_Size(messages))
			continue;
		if (status == MORE)	/* something was skipped */
			return from_status(MORE);
		if (!poll || PyObject_Size(args[9]) || PyObject_Size(args[10]) ||
		    may_receive(self) != OK ||
		    (double)now_ns() * 1e-9 >= poll_until_s)
			return from_status(OK);
		begin_use(self);
		hit = spin(&self->channel, 1, poll, &spent);
		end_use(self);
		self->poll_ns += spent;
		if (!hit)
			return from_status(OK);
		self->polls_hit++;
	}
}

PyDoc_STRVAR(channel_wake_producer_doc,
"wake_producer()\n\nRing, if the peer sleeps until there is space. After receiving\n"
"lazily.");

static PyObject *channel_wake_producer(ChannelObject *self, PyObject *unused)
{
	(void)unused;
	self->owing = 0;
	if (may_receive(self) == OK) {
		begin_use(self);
		if (kucomms_channel_wake_producer(self->channel))
			ring_doorbell(self);
		end_use(self);
	}
	Py_RETURN_NONE;
}

PyDoc_STRVAR(channel_borrow_doc,
"borrow() -> Borrow, Message or status\n\nThe next message in place, or as on_frame() made\n"
"it. EMPTY also when something was skipped: whether there is nothing, park_receive()\n"
"says.");

static PyObject *channel_borrow(ChannelObject *self, PyObject *unused)
{
	struct kucomms_view view;
	BorrowObject *borrow;
	enum status status;
	int err;

	(void)unused;
	status = may_receive(self);
	if (status != OK)
		return from_status(status);
	if (self->receiving)
		return from_status(EMPTY);
	borrow = PyObject_New(BorrowObject, self->state->borrow_type);
	if (!borrow)
		return NULL;
	borrow->channel = NULL;
	borrow->exports = 0;
	borrow->released = 0;
	borrow->pinned = 0;
	/* allocating may have run anything */
	status = may_receive(self);
	if (status != OK) {
		Py_DECREF(borrow);
		return from_status(status);
	}
	err = kucomms_channel_peek(self->channel, &view);
	if (err) {
		Py_DECREF(borrow);
		/* what was skipped on the way */
		if (kucomms_channel_release(self->channel))
			ring_doorbell(self);
		return from_status(err == -EPROTO ? PROTOCOL : EMPTY);
	}
	if (view.kind != KUCOMMS_KIND_MESSAGE) {
		PyObject *message;

		Py_DECREF(borrow);
		if (!is_reply(self, &view))
			view.flags &= ~(uint32_t)KUCOMMS_FLAG_REPLY;
		begin_use(self);
		self->receiving = 1;
		message = take_front(self, &view);
		self->receiving = 0;
		release_space(self, 0);
		end_use(self);
		if (!message)
			return PyErr_Occurred() ? NULL : from_status(PROTOCOL);
		if (message != Py_None)
			return message;
		Py_DECREF(message);
		return from_status(EMPTY);
	}
	borrow->channel = (ChannelObject *)Py_NewRef((PyObject *)self);
	borrow->view = view;
	if (!is_reply(self, &view))
		borrow->view.flags &= ~(uint32_t)KUCOMMS_FLAG_REPLY;
	borrow->pinned = 1;
	self->users++;
	kucomms_channel_borrow(self->channel, &view, &borrow->pin);
	return (PyObject *)borrow;
}

PyDoc_STRVAR(channel_park_receive_doc,
"park_receive() -> bool\n\nAsk for the doorbell when a message comes. True when\n"
"there is something already: look instead of waiting.");

static PyObject *channel_park_receive(ChannelObject *self, PyObject *unused)
{
	(void)unused;
	if (may_receive(self) != OK)
		Py_RETURN_FALSE;
	return PyBool_FromLong(kucomms_channel_park_rx(self->channel));
}

PyDoc_STRVAR(channel_park_send_doc,
"park_send(size) -> bool\n\nAsk for the doorbell when there is room. True when\n"
"there is already: try again instead of waiting. Any thread.");

static PyObject *channel_park_send(ChannelObject *self, PyObject *size)
{
	unsigned long long length = PyLong_AsUnsignedLongLong(size);
	int must_ring;

	if (length == (unsigned long long)-1 && PyErr_Occurred())
		return NULL;
	if (may_send(self, 1) != OK || length > UINT32_MAX)
		Py_RETURN_TRUE;
	begin_use(self);
	must_ring = kucomms_channel_park_tx(self->channel, (uint32_t)length);
	if (must_ring == 1)
		ring_doorbell(self);
	end_use(self);
	return PyBool_FromLong(must_ring == -EAGAIN);
}

PyDoc_STRVAR(channel_unpark_send_doc,
"unpark_send()\n\nTell the peer that nobody waits for room any more. Any thread.");

static PyObject *channel_unpark_send(ChannelObject *self, PyObject *unused)
{
	(void)unused;
	if (may_send(self, 1) == OK)
		kucomms_channel_unpark_tx(self->channel);
	Py_RETURN_NONE;
}

PyDoc_STRVAR(channel_stop_sending_doc,
"stop_sending(state)\n\nNo more sends from here. With a state other than 0, tell\n"
"the peer that nothing more comes, and ring.");

static PyObject *channel_stop_sending(ChannelObject *self, PyObject *state)
{
	unsigned long value = PyLong_AsUnsignedLong(state);

	if (value == (unsigned long)-1 && PyErr_Occurred())
		return NULL;
	self->open = 0;
	if (value && !forked(self) && self->mapped && self->attached) {
		kucomms_channel_close(self->channel, (uint32_t)value);
		ring_doorbell(self);
	}
	Py_RETURN_NONE;
}

PyDoc_STRVAR(channel_finish_doc,
"finish()\n\nThe peer is gone for good: what it left half-written is skipped.");

static PyObject *channel_finish(ChannelObject *self, PyObject *unused)
{
	(void)unused;
	self->channel->rx.final = 1;
	Py_RETURN_NONE;
}

PyDoc_STRVAR(channel_unmap_doc,
"unmap()\n\nNo more use. The memory goes as soon as no loan or borrow is in use.");

static PyObject *channel_unmap(ChannelObject *self, PyObject *unused)
{
	(void)unused;
	self->open = 0;
	self->attached = 0;
	self->unmap_wanted = 1;
	self->eventfd = -1;
	Py_CLEAR(self->doorbell);
	Py_CLEAR(self->room);
	Py_CLEAR(self->frames);
	unmap_if_unused(self);
	Py_RETURN_NONE;
}

static int readable(const ChannelObject *self)
{
	return self->mapped && self->attached && !forked(self);
}

static PyObject *channel_get_may_receive(ChannelObject *self, void *unused)
{
	(void)unused;
	return from_status(may_receive(self));
}

static PyObject *channel_get_peer_state(ChannelObject *self, void *unused)
{
	(void)unused;
	return PyLong_FromUnsignedLong(readable(self) ?
		kucomms_ring_peer_state(&self->channel->rx) : 0);
}

static PyObject *channel_get_peer_starves(ChannelObject *self, void *unused)
{
	(void)unused;
	return PyBool_FromLong(readable(self) &&
			       kucomms_channel_peer_starves(self->channel));
}

static PyObject *channel_get_turns(ChannelObject *self, void *unused)
{
	(void)unused;
	return PyBool_FromLong(kucomms_channel_has_turns(self->channel));
}

static PyObject *channel_get_has_turn(ChannelObject *self, void *unused)
{
	(void)unused;
	return PyBool_FromLong(kucomms_channel_has_turn(self->channel));
}

static PyObject *channel_get_owing(ChannelObject *self, void *unused)
{
	(void)unused;
	return PyBool_FromLong(self->owing);
}

static PyObject *channel_get_tx_avail(ChannelObject *self, void *unused)
{
	(void)unused;
	return PyLong_FromUnsignedLongLong(readable(self) ?
		kucomms_channel_tx_avail(self->channel) : 0);
}

static PyObject *channel_get_tx_free(ChannelObject *self, void *unused)
{
	(void)unused;
	return PyLong_FromUnsignedLongLong(readable(self) && self->open ?
		kucomms_channel_tx_free(self->channel) : 0);
}

static PyObject *channel_get_rx_position(ChannelObject *self, void *unused)
{
	(void)unused;
	return PyLong_FromUnsignedLongLong(self->channel->rx.position);
}

static PyObject *channel_get_rx_avail(ChannelObject *self, void *unused)
{
	(void)unused;
	return PyLong_FromUnsignedLongLong(readable(self) ?
		kucomms_channel_rx_avail(self->channel) : 0);
}

PyDoc_STRVAR(channel_counters_doc,
"counters() -> tuple\n\nmessages sent, bytes sent, messages received, bytes\n"
"received, full waits, doorbells rung, doorbells suppressed, protocol errors,\n"
"tx high water, rx high water.");

static PyObject *channel_counters(ChannelObject *self, PyObject *unused)
{
	struct kucomms_channel *channel = self->channel;
	unsigned long long chances = channel->publishes + channel->releases;

	(void)unused;
	return Py_BuildValue("(KKKKKKKKKK)",
			     (unsigned long long)channel->messages_sent,
			     (unsigned long long)channel->bytes_sent,
			     (unsigned long long)channel->messages_received,
			     (unsigned long long)channel->bytes_received,
			     (unsigned long long)channel->full_waits,
			     (unsigned long long)channel->doorbells_rung,
			     chances - channel->doorbells_rung,
			     (unsigned long long)channel->protocol_errors,
			     (unsigned long long)channel->tx.high_water,
			     (unsigned long long)channel->rx.high_water);
}

static PyObject *channel_get_address(ChannelObject *self, void *unused)
{
	(void)unused;
	return PyLong_FromUnsignedLongLong((uintptr_t)self->channel);
}

static PyObject *channel_get_ring_size(ChannelObject *self, void *unused)
{
	(void)unused;
	return PyLong_FromUnsignedLongLong(self->channel->ring_size);
}

static PyObject *channel_get_forked(ChannelObject *self, void *unused)
{
	(void)unused;
	return PyBool_FromLong(forked(self));
}

static PyMethodDef channel_methods[] = {
	METHOD("attach", channel_attach, METH_O, channel_attach_doc),
	METHOD("mute", channel_mute, METH_NOARGS, channel_mute_doc),
	METHOD("on_room", channel_on_room, METH_O, channel_on_room_doc),
	METHOD("expect", channel_expect, METH_O, channel_expect_doc),
	METHOD("send", channel_send, METH_FASTCALL, channel_send_doc),
	METHOD("send_paced", channel_send_paced, METH_FASTCALL,
	       channel_send_paced_doc),
	METHOD("send_reply", channel_send_reply, METH_FASTCALL,
	       channel_send_reply_doc),
	METHOD("send_threadsafe", channel_send_threadsafe, METH_FASTCALL,
	       channel_send_threadsafe_doc),
	METHOD("on_frame", channel_on_frame, METH_O, channel_on_frame_doc),
	METHOD("send_front", channel_send_front, METH_FASTCALL,
	       channel_send_front_doc),
	METHOD("send_many", channel_send_many, METH_FASTCALL,
	       channel_send_many_doc),
	METHOD("reserve", channel_reserve, METH_FASTCALL, channel_reserve_doc),
	METHOD("receive", channel_receive, METH_FASTCALL, channel_receive_doc),
	METHOD("hold_turn", channel_hold_turn, METH_NOARGS, channel_hold_turn_doc),
	METHOD("take_turn", channel_take_turn, METH_NOARGS, channel_take_turn_doc),
	METHOD("wake_producer", channel_wake_producer, METH_NOARGS,
	       channel_wake_producer_doc),
	METHOD("serve", channel_serve, METH_FASTCALL, channel_serve_doc),
	METHOD("borrow", channel_borrow, METH_NOARGS, channel_borrow_doc),
	METHOD("park_receive", channel_park_receive, METH_NOARGS,
	       channel_park_receive_doc),
	METHOD("park_send", channel_park_send, METH_O, channel_park_send_doc),
	METHOD("unpark_send", channel_unpark_send, METH_NOARGS,
	       channel_unpark_send_doc),
	METHOD("stop_sending", channel_stop_sending, METH_O,
	       channel_stop_sending_doc),
	METHOD("finish", channel_finish, METH_NOARGS, channel_finish_doc),
	METHOD("unmap", channel_unmap, METH_NOARGS, channel_unmap_doc),
	METHOD("counters", channel_counters, METH_NOARGS, channel_counters_doc),
	{ NULL, NULL, 0, NULL },
};

#define GETTER(name, doc) \
	{ #name, (getter)channel_get_##name, NULL, doc, NULL }

static PyGetSetDef channel_getset[] = {
	GETTER(may_receive, "OK, CLOSED, WRONG_THREAD or FORKED"),
	GETTER(peer_state, "what the peer says of itself: 0 open"),
	GETTER(peer_starves, "after parking: the peer waits for what is borrowed"),
	GETTER(turns, "whether only one side may send at a time"),
	GETTER(has_turn, "whether this side may send"),
	GETTER(owing, "after receiving lazily: wake_producer() is to be called"),
	GETTER(tx_avail, "bytes sent and not yet released by the peer"),
	GETTER(tx_free, "bytes that can be sent now, headers included"),
	GETTER(rx_position, "bytes that were read since the link was made"),
	GETTER(rx_avail, "bytes that wait to be read, headers included"),
	GETTER(address, "of struct kucomms_channel, for _setup"),
	GETTER(ring_size, "bytes of each ring"),
	GETTER(forked, "whether this is a child of the process that made it"),
	{ NULL, NULL, NULL, NULL, NULL },
};

PyDoc_STRVAR(channel_doc,
"Channel(address)\n\n"
"Takes over a struct kucomms_channel that _setup made. Every method but\n"
"send_threadsafe and the two for parking sends belongs to the thread of attach().");

static PyMemberDef channel_members[] = {
	{ "loans", T_UINT, offsetof(ChannelObject, loans), READONLY,
	  "that are out" },
	{ "calls", T_ULONGLONG, offsetof(ChannelObject, calls), READONLY,
	  "of handlers, by serve()" },
	{ "polls_hit", T_ULONGLONG, offsetof(ChannelObject, polls_hit),
	  READONLY, "polls in serve() that found something" },
	{ "poll_ns", T_ULONGLONG, offsetof(ChannelObject, poll_ns), READONLY,
	  "nanoseconds of polling in serve()" },
	{ NULL, 0, 0, 0, NULL },
};

static PyType_Slot channel_slots[] = {
	SLOT(Py_tp_new, channel_new),
	SLOT(Py_tp_dealloc, channel_dealloc),
	SLOT(Py_tp_traverse, channel_traverse),
	SLOT(Py_tp_clear, channel_clear),
	SLOT(Py_tp_methods, channel_methods),
	SLOT(Py_tp_members, channel_members),
	SLOT(Py_tp_getset, channel_getset),
	{ Py_tp_doc, (void *)channel_doc },
	{ 0, NULL },
};

static PyType_Spec channel_spec = {
	.name = "kucomms._core._ring.Channel",
	.basicsize = sizeof(ChannelObject),
	.flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC,
	.slots = channel_slots,
};

/* ---- module -------------------------------------------------------------- */

PyDoc_STRVAR(configure_doc,
"configure(message_type, token_type, coroutine_type)\n\nThe class of received messages:\n"
"called with data, type, id, user_value, which are its attributes as well; that of\n"
"tokens, a subclass; and that of what calling a coroutine function gives.");

static PyObject *configure(PyObject *module, PyObject *const *args,
			   Py_ssize_t nargs)
{
	struct module_state *state = PyModule_GetState(module);

	if (check_args("configure", nargs, 3))
		return NULL;
	if (!PyType_Check(args[0]) || !PyType_Check(args[1]) ||
	    !PyType_Check(args[2])) {
		PyErr_SetString(PyExc_TypeError, "not a type");
		return NULL;
	}
	Py_XDECREF(state->message_type);
	Py_XDECREF(state->token_type);
	Py_XDECREF(state->coroutine_type);
	state->message_type = (PyTypeObject *)Py_NewRef(args[0]);
	state->token_type = (PyTypeObject *)Py_NewRef(args[1]);
	state->coroutine_type = (PyTypeObject *)Py_NewRef(args[2]);
	Py_RETURN_NONE;
}

PyDoc_STRVAR(ring_socket_doc,
"ring_socket(fd) -> errno\n\n"
"Write the doorbell byte, never blocking. Keeps the GIL, so that no other thread\n"
"can close fd and open another one under the same number in between. A full\n"
"socket is a success: the peer has a byte to wake up for.");

static PyObject *ring_socket(PyObject *module, PyObject *fd)
{
	static const char bell = 1;
	long number = PyLong_AsLong(fd);

	(void)module;
	if (number == -1 && PyErr_Occurred())
		return NULL;
	while (send((int)number, &bell, 1, MSG_DONTWAIT | MSG_NOSIGNAL) < 0) {
		if (errno == EINTR)
			continue;
		if (errno == EAGAIN || errno == EWOULDBLOCK)
			break;
		return PyLong_FromLong(errno);
	}
	return PyLong_FromLong(0);
}

PyDoc_STRVAR(drain_eventfd_doc,
"drain_eventfd(fd) -> errno\n\nTake the doorbells off, never blocking. EAGAIN: none.");

static PyObject *drain_eventfd(PyObject *module, PyObject *fd)
{
	long number = PyLong_AsLong(fd);
	uint64_t bells;
	struct iovec at = { &bells, sizeof(bells) };

	(void)module;
	if (number == -1 && PyErr_Occurred())
		return NULL;
	/* The peer shares the descriptor's O_NONBLOCK and can clear it. */
	while (preadv2((int)number, &at, 1, -1, RWF_NOWAIT) < 0)
		if (errno != EINTR)
			return PyLong_FromLong(errno);
	return PyLong_FromLong(0);
}

PyDoc_STRVAR(ring_device_doc,
"ring_device(fd) -> errno\n\n"
"Ring the kernel's doorbell. Keeps the GIL, as ring_socket().");

static PyObject *ring_device(PyObject *module, PyObject *fd)
{
	long number = PyLong_AsLong(fd);

	(void)module;
	if (number == -1 && PyErr_Occurred())
		return NULL;
	return PyLong_FromLong(ioctl((int)number, KUCOMMS_IOC_KICK) ? errno : 0);
}

PyDoc_STRVAR(drain_socket_doc,
"drain_socket(fd) -> status\n\n"
"Take the doorbells off a socket, never blocking. OK: it is empty. FULL: there is\n"
"more than can be read in one go. CLOSED: it has ended. PROTOCOL: there was\n"
"something else than doorbells, which is left in it. If it was files, so is what comes\n"
"with them: to drop one can block for as long as its owner likes.");

static PyObject *drain_socket(PyObject *module, PyObject *fd)
{
	long number = PyLong_AsLong(fd);
	struct msghdr message;
	char bells[4096];
	ssize_t size, at;
	struct iovec part;
	int round;

	(void)module;
	if (number == -1 && PyErr_Occurred())
		return NULL;
	for (round = 0; round < 64; round++) {
		memset(&message, 0, sizeof(message));
		part.iov_base = bells;
		part.iov_len = sizeof(bells);
		message.msg_iov = &part;
		message.msg_iovlen = 1;
		size = recvmsg((int)number, &message, MSG_PEEK | MSG_DONTWAIT);
		for (at = 0; at < size && bells[at] == 1; at++)
			;
		if (size > 0 && (!at || message.msg_flags & MSG_CTRUNC))
			return from_status(PROTOCOL);
		if (size > 0)
			size = recv((int)number, bells, (size_t)at,
				    MSG_DONTWAIT);
		if (size < 0 && errno == EINTR)
			continue;
		if (size < 0 && (errno == EAGAIN || errno == EWOULDBLOCK))
			return from_status(OK);
		if (size <= 0)
			return from_status(CLOSED);
	}
	return from_status(FULL);
}

PyDoc_STRVAR(poll_doc,
"poll(channels, nanoseconds) -> int\n\n"
"Spin until one of a list of channels (of which the first 64 count) has something\n"
"to read, without the GIL but for the first microsecond. How many nanoseconds it\n"
"took, getting the GIL back included; as a negative number when nothing came.");

static PyObject *poll_channels(PyObject *module, PyObject *const *args,
			       Py_ssize_t nargs)
{
	struct module_state *state = PyModule_GetState(module);
	struct kucomms_channel *channels[POLL_MOST];
	ChannelObject *objects[POLL_MOST];
	unsigned long long limit;
	unsigned int count = 0, i;
	uint64_t taken = 0;
	int hit = 0;

	if (check_args("poll", nargs, 2))
		return NULL;
	limit = PyLong_AsUnsignedLongLong(args[1]);
	if (limit == (unsigned long long)-1 && PyErr_Occurred())
		return NULL;
	for (; count < POLL_MOST && (Py_ssize_t)count < PyList_Size(args[0]);
	     count++) {
		PyObject *item = PyList_GetItem(args[0], count);

		if (!item || !PyObject_TypeCheck(item, state->channel_type)) {
			PyErr_SetString(PyExc_TypeError, "a list of channels");
			goto error;
		}
		objects[count] = (ChannelObject *)Py_NewRef(item);
		begin_use(objects[count]);
		channels[count] = objects[count]->channel;
		/* One that is over needs to be looked at. */
		if (may_receive(objects[count]) != OK) {
			count++;
			hit = 1;
			break;
		}
	}
	if (!hit)
		hit = spin(channels, count, limit, &taken);
	for (i = 0; i < count; i++) {
		end_use(objects[i]);
		Py_DECREF(objects[i]);
	}
	return PyLong_FromLongLong(hit ? (long long)taken : -(long long)taken - 1);

error:
	for (i = 0; i < count; i++) {
		end_use(objects[i]);
		Py_DECREF(objects[i]);
	}
	return NULL;
}

static PyMethodDef module_methods[] = {
	METHOD("drain_eventfd", drain_eventfd, METH_O, drain_eventfd_doc),
	METHOD("drain_socket", drain_socket, METH_O, drain_socket_doc),
	METHOD("poll", poll_channels, METH_FASTCALL, poll_doc),
	METHOD("configure", configure, METH_FASTCALL, configure_doc),
	METHOD("ring_device", ring_device, METH_O, ring_device_doc),
	METHOD("ring_socket", ring_socket, METH_O, ring_socket_doc),
	{ NULL, NULL, 0, NULL },
};

static PyTypeObject *add_type(PyObject *module, PyType_Spec *spec)
{
	PyTypeObject *type =
		(PyTypeObject *)PyType_FromModuleAndSpec(module, spec, NULL);

	if (type && PyModule_AddType(module, type))
		Py_CLEAR(type);
	return type;
}

static int module_exec(PyObject *module)
{
	struct module_state *state = PyModule_GetState(module);
	static int atfork_done;
	static const struct { const char *name; long value; } constants[] = {
		{ "OK", OK },
		{ "FULL", FULL },
		{ "EMPTY", EMPTY },
		{ "TOO_LARGE", TOO_LARGE },
		{ "CLOSED", CLOSED },
		{ "PROTOCOL", PROTOCOL },
		{ "WRONG_THREAD", WRONG_THREAD },
		{ "FORKED", FORKED },
		{ "TOO_MANY_LOANS", TOO_MANY_LOANS },
		{ "PAUSE", PAUSE },
		{ "MORE", MORE },
		{ "OUT_OF_TURN", OUT_OF_TURN },
		{ "NO_TOKEN", NO_TOKEN },
		{ "FLAG_REPLY", KUCOMMS_FLAG_REPLY },
		{ "FLAG_TOKEN", KUCOMMS_FLAG_TOKEN },
		{ "FLAG_NOTICE", KUCOMMS_FLAG_NOTICE },
		{ "KIND_BUFFER", KUCOMMS_KIND_BUFFER },
		{ "KIND_POOL", KUCOMMS_KIND_POOL },
		{ "CARRIED_MAX", KUCOMMS_CARRIED_MAX },
		{ "POOLS_MAX", KUCOMMS_POOLS_MAX },
		{ "STATE_OPEN", KUCOMMS_STATE_OPEN },
		{ "STATE_CLOSED", KUCOMMS_STATE_CLOSED },
		{ "STATE_SHUTDOWN", KUCOMMS_STATE_SHUTDOWN },
		{ "HEADER_SIZE", (long)KUCOMMS_HEADER_SIZE },
	};
	size_t i;

	if (!atfork_done) {
		if (pthread_atfork(before_fork, after_fork_parent,
				   after_fork_child)) {
			PyErr_NoMemory();
			return -1;
		}
		atfork_done = 1;
	}
	state->channel_type = add_type(module, &channel_spec);
	state->reservation_type = add_type(module, &reservation_spec);
	state->borrow_type = add_type(module, &borrow_spec);
	state->name_data = PyUnicode_InternFromString("data");
	state->name_type = PyUnicode_InternFromString("type");
	state->name_id = PyUnicode_InternFromString("id");
	state->name_user_value = PyUnicode_InternFromString("user_value");
	if (!state->channel_type || !state->reservation_type ||
	    !state->borrow_type || !state->name_data || !state->name_type ||
	    !state->name_id || !state->name_user_value)
		return -1;
	for (i = 0; i < sizeof(constants) / sizeof(*constants); i++)
		if (PyModule_AddIntConstant(module, constants[i].name,
					    constants[i].value))
			return -1;
	return 0;
}

static int module_traverse(PyObject *module, visitproc visit, void *arg)
{
	struct module_state *state = PyModule_GetState(module);

	Py_VISIT(state->channel_type);
	Py_VISIT(state->reservation_type);
	Py_VISIT(state->borrow_type);
	Py_VISIT(state->message_type);
	Py_VISIT(state->token_type);
	Py_VISIT(state->coroutine_type);
	return 0;
}

static int module_clear(PyObject *module)
{
	struct module_state *state = PyModule_GetState(module);

	Py_CLEAR(state->channel_type);
	Py_CLEAR(state->reservation_type);
	Py_CLEAR(state->borrow_type);
	Py_CLEAR(state->message_type);
	Py_CLEAR(state->token_type);
	Py_CLEAR(state->coroutine_type);
	Py_CLEAR(state->name_data);
	Py_CLEAR(state->name_type);
	Py_CLEAR(state->name_id);
	Py_CLEAR(state->name_user_value);
	return 0;
}

static PyModuleDef_Slot module_slots[] = {
	SLOT(Py_mod_exec, module_exec),
	{ 0, NULL },
};

static struct PyModuleDef module_def = {
	PyModuleDef_HEAD_INIT,
	.m_name = "kucomms._core._ring",
	.m_doc = "What runs per message; see the head of _ring.c.",
	.m_size = sizeof(struct module_state),
	.m_methods = module_methods,
	.m_slots = module_slots,
	.m_traverse = module_traverse,
	.m_clear = module_clear,
};

PyMODINIT_FUNC PyInit__ring(void);

PyMODINIT_FUNC PyInit__ring(void)
{
	return PyModuleDef_Init(&module_def);
}
