// A stream is a worker thread that takes its operations in order. Copies one way take turns, as on a copy engine, and
// so do kernels: a network fills the device. Beside the real time, in which everything happens, runs the device's own:
// a stream is ready when its last operation ended as planned, however late a thread of a busy machine woke up. So the
// device is no slower than it was set to be.
#include "sim.h"
#include <errno.h>

pthread_mutex_t lock = PTHREAD_ERRORCHECK_MUTEX_INITIALIZER_NP; // see the fault handler
pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
stream_t *streams, default_stream;
int stream_ids, default_started;
uint32_t done_ticket[MAX_STREAMS];
__thread int in_host_function;

static int id_taken[MAX_STREAMS];
static struct { unsigned next, serving; double busy_until; } turns[ENGINES];
static const enum engine engine_of[STAGES] = {
    [HTOD] = UPLOAD, [DTOH] = DOWNLOAD, [DTOD] = COMPUTE, [MEMSET] = COMPUTE, [LAUNCH] = COMPUTE,
    [RECORD] = ENGINES, [WAIT] = ENGINES, // on none
};

double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + 1e-9 * t.tv_nsec;
}

static void sleep_until(double when) {
    struct timespec t = {(time_t)when, (long)((when - (double)(time_t)when) * 1e9)};
    if (when <= now()) return;
    while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &t, NULL) == EINTR) continue;
}

void drop_record(record_t *record) {
    if (record && --record->references == 0) free(record);
}

// Seconds that the settings add to the work. Each stream draws its own numbers: the same ones in every run.
static double duration(stream_t *stream, const operation_t *o) {
    const double fixed[STAGES] = {settings.htod_us, settings.dtoh_us, settings.dtod_us, 0, settings.launch_us, 0, 0};
    double us = fixed[o->stage];
    if (settings.gbps > 0 && (o->stage == HTOD || o->stage == DTOH)) us += o->size / settings.gbps * 1e-3;
    if (settings.jitter_us > 0) {
        stream->random ^= stream->random << 13, stream->random ^= stream->random >> 7;
        stream->random ^= stream->random << 17;
        us += settings.jitter_us * (stream->random % 1024) / 1024.0;
    }
    return us * 1e-6;
}

static int work(const operation_t *o) { // without the lock
    switch (o->stage) {
    case HTOD:
    case DTOH:
    case DTOD: memmove(o->target, o->staged ? o->staged : o->source, o->size); return 0;
    case MEMSET:
        for (size_t i = 0; i < o->size; i += o->width) memcpy(o->target + i, &o->value, o->width);
        return 0;
    case LAUNCH: {
        in_host_function = 1;
        int failed = o->function(o->argument);
        in_host_function = 0;
        return failed;
    }
    default: return 0;
    }
}

static double later(double a, double b) { return a > b ? a : b; }

static void hang_or_break(stream_t *stream, enum stage stage) { // locked
    int failure = injected_at_stage(stage);
    if (failure == INJECTED_HANG) stream->ready = now();
    else if (failure) broken = failure;
}

static void run_on_engine(stream_t *stream, operation_t *o) { // locked
    enum engine engine = engine_of[o->stage];
    hang_or_break(stream, o->stage);
    unsigned turn = turns[engine].next++;
    while (turns[engine].serving != turn) pthread_cond_wait(&changed, &lock);
    if (!broken) { // a context that a kernel broke runs nothing more
        double begin = later(stream->ready, turns[engine].busy_until);
        double end = begin + duration(stream, o);
        pthread_mutex_unlock(&lock);
        sleep_until(end);
        double started = now();
        int failed = work(o);
        end += now() - started;
        pthread_mutex_lock(&lock);
        stream->ready = turns[engine].busy_until = end;
        if (failed) broken = CUDA_ERROR_LAUNCH_FAILED;
        trace(engine, stream, begin, end, o->size);
    }
    turns[engine].serving++;
}

static void run(stream_t *stream, operation_t *o) { // locked
    stream->ready = later(stream->ready, o->submitted);
    for (int i = 0; i < o->dependency_count; i++) {
        dependency_t *on = &o->dependencies[i];
        while (on->stream->completed < on->ticket) pthread_cond_wait(&changed, &lock);
        stream->ready = later(stream->ready, on->stream->ready);
    }
    if (o->stage == WAIT) {
        hang_or_break(stream, WAIT);
        while (!o->record->done) pthread_cond_wait(&changed, &lock);
        stream->ready = later(stream->ready, o->record->time);
    } else if (o->stage == RECORD) {
        hang_or_break(stream, RECORD);
        o->record->done = 1;
        o->record->time = stream->ready;
    } else {
        run_on_engine(stream, o);
    }
}

static void finish(stream_t *stream, operation_t *o) { // locked
    stream->head = o->next;
    if (!stream->head) stream->tail = NULL;
    stream->completed = done_ticket[stream->id] = o->ticket;
    unmap_finished();
    drop_record(o->record);
    free(o->staged);
    free(o->dependencies);
    free(o);
    pthread_cond_broadcast(&changed);
}

static void *worker(void *argument) {
    stream_t *stream = argument;
    pthread_mutex_lock(&lock);
    while (stream->live || stream->head) {
        if (stream->head) {
            run(stream, stream->head);
            finish(stream, stream->head);
        } else {
            pthread_cond_wait(&changed, &lock);
        }
    }
    id_taken[stream->id] = 0;
    stream_t **link = &streams;
    while (*link != stream) link = &(*link)->next;
    *link = stream->next; // the struct itself stays, so that a stale handle is known as one
    pthread_mutex_unlock(&lock);
    return NULL;
}

// A freed stream's id may name a new one, whose tickets go on from there; but preferably only once the host has waited
// for all that the old one did, since until then the clocks would take its work for the new stream's own.
static int free_id(void) {
    int fallback = -1;
    for (int id = 0; id < stream_ids; id++)
        if (!id_taken[id]) {
            if (host_clock.ticket[id] >= done_ticket[id]) return id;
            fallback = id;
        }
    return stream_ids < MAX_STREAMS ? stream_ids++ : fallback;
}

int start_stream(stream_t *stream, unsigned flags) {
    int id = free_id();
    if (id < 0) return 0;
    id_taken[id] = 1;
    *stream = (stream_t){.next = streams, .flags = flags, .live = 1, .id = id};
    stream->submitted = stream->completed = done_ticket[id];
    stream->random = 0x9E3779B97F4A7C15u * (uint64_t)(settings.seed + 1) + (uint64_t)id + 1;
    streams = stream;
    pthread_t thread;
    pthread_create(&thread, NULL, worker, stream);
    pthread_detach(thread);
    return 1;
}

stream_t *stream_of(CUstream handle) {
    if (handle && handle != CU_STREAM_LEGACY) {
        return handle != CU_STREAM_PER_THREAD && handle->live ? handle : NULL;
    }
    if (!default_started) default_started = start_stream(&default_stream, 0);
    return default_started ? &default_stream : NULL;
}

static void depend(operation_t *o, stream_t *stream, stream_t *on) {
    o->dependencies[o->dependency_count++] = (dependency_t){on, on->submitted};
    join_clock(&stream->clock, &on->clock);
}

// The legacy default stream waits for all blocking streams, and they wait for it.
static void order_with_default_stream(operation_t *o, stream_t *stream) {
    if (!default_started || stream->flags & CU_STREAM_NON_BLOCKING) return;
    o->dependencies = malloc(sizeof *o->dependencies * MAX_STREAMS);
    if (stream != &default_stream) {
        depend(o, stream, &default_stream);
        return;
    }
    for (stream_t *other = streams; other; other = other->next)
        if (other != stream && !(other->flags & CU_STREAM_NON_BLOCKING)) depend(o, stream, other);
}

// Queue an operation, after all that the stream and the host have seen. It is filled in before the lock is let go.
operation_t *push(stream_t *stream, enum stage stage) {
    operation_t *o = calloc(1, sizeof *o);
    o->stage = stage;
    o->submitted = now();
    o->ticket = ++stream->submitted;
    join_clock(&stream->clock, &host_clock);
    order_with_default_stream(o, stream);
    stream->clock.ticket[stream->id] = o->ticket;
    if (stream->tail) stream->tail->next = o;
    else stream->head = o;
    stream->tail = o;
    pthread_cond_broadcast(&changed);
    return o;
}

void wait_for(stream_t *stream, uint32_t ticket) {
    while (stream->completed < ticket) pthread_cond_wait(&changed, &lock);
}

void wait_for_all(void) {
    // A stream may leave the list during the wait; its link still leads on.
    for (stream_t *stream = streams; stream; stream = stream->next) {
        vclock_t reached = stream->clock;
        wait_for(stream, stream->submitted);
        host_waited_for(&reached);
    }
}
