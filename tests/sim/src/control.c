// The calls beside CUDA's own, for tests: settings, injected errors and hangs, counts, reports, the timeline.
#include "sim.h"
#include <stdarg.h>
#include <stddef.h>

static const settings_t usual = {.memory = 4.0 * (1 << 30), .devices = 1, .race = 1, .seed = 1};
settings_t settings = {.memory = 4.0 * (1 << 30), .devices = 1, .race = 1, .seed = 1};
counts_t counts;
CUresult broken;

static const struct { const char *name; size_t offset; } names[] = {
#define NAMED(field) {#field, offsetof(settings_t, field)}
    NAMED(htod_us), NAMED(dtoh_us), NAMED(dtod_us), NAMED(launch_us), NAMED(gbps), NAMED(jitter_us),
    NAMED(memory),  NAMED(devices), NAMED(guard),   NAMED(race),      NAMED(seed),
};

EXTENSION int simcuda_set(const char *name, double value) {
    for (size_t i = 0; i < sizeof names / sizeof *names; i++)
        if (!strcmp(names[i].name, name)) {
            pthread_mutex_lock(&lock);
            memcpy((char *)&settings + names[i].offset, &value, sizeof value);
            pthread_mutex_unlock(&lock);
            return 0;
        }
    return 1;
}

// ------------------------------------------------------------------ reports
#define REPORTS 64
static char reports[REPORTS][256];
static int report_count;

void report(const char *format, ...) { // locked
    if (report_count >= REPORTS) return; // the first ones tell; counts go on
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(reports[report_count], sizeof *reports, format, arguments);
    va_end(arguments);
    if (getenv("SIMCUDA_VERBOSE")) dprintf(2, "simulated CUDA: %s\n", reports[report_count]);
    report_count++;
}

EXTENSION const char *simcuda_report(int index) {
    pthread_mutex_lock(&lock);
    const char *text = index < report_count ? reports[index] : NULL;
    pthread_mutex_unlock(&lock);
    return text;
}

EXTENSION void simcuda_counts(counts_t *result) {
    pthread_mutex_lock(&lock);
    *result = counts;
    pthread_mutex_unlock(&lock);
}

// --------------------------------------------------- calls, errors and hangs
#define CALLS 256
typedef struct {
    char name[48]; // of an entry point without its version, or of a stage as "run:htod"
    int count;     // calls so far
    int wait;      // calls until the trouble begins; 0: none set
    int times;     // how many calls it lasts
    int trouble;   // a CUresult or INJECTED_HANG
} call_t;
static call_t calls[CALLS];
static int call_count, hanging;
static unsigned releases; // tells a hanging thread that it was let go

static call_t *call_named(const char *name) { // locked; "cuMemAlloc_v2" is "cuMemAlloc"
    size_t length = strlen(name);
    if (length > 3 && name[length - 3] == '_' && name[length - 2] == 'v') length -= 3;
    for (int i = 0; i < call_count; i++)
        if (strlen(calls[i].name) == length && !strncmp(calls[i].name, name, length)) return &calls[i];
    if (call_count == CALLS || length >= sizeof calls->name) abort();
    call_t *call = &calls[call_count++];
    *call = (call_t){0};
    memcpy(call->name, name, length);
    return call;
}

static int trouble_of(call_t *call) {
    call->count++;
    if (call->wait > 1) {
        call->wait--;
        return 0;
    }
    if (!call->wait) return 0;
    if (--call->times == 0) call->wait = 0;
    return call->trouble;
}

CUresult injected(const char *name) { return trouble_of(call_named(name)); }

int injected_at_stage(enum stage stage) {
    static const char *const stages[STAGES] = {"run:htod",   "run:dtoh",   "run:dtod", "run:memset",
                                               "run:launch", "run:record", "run:wait"};
    int trouble = trouble_of(call_named(stages[stage]));
    if (trouble != INJECTED_HANG) return trouble;
    unsigned before = releases;
    hanging++;
    pthread_cond_broadcast(&changed);
    while (releases == before) pthread_cond_wait(&changed, &lock);
    hanging--;
    return INJECTED_HANG;
}

// From the n-th such call from now on, that many calls fail with the error (or, at a stage, hang).
EXTENSION void simcuda_inject(const char *name, int nth, int times, int trouble) {
    pthread_mutex_lock(&lock);
    call_t *call = call_named(name);
    call->wait = nth;
    call->times = times;
    call->trouble = trouble;
    pthread_mutex_unlock(&lock);
}

EXTENSION int simcuda_hanging(void) {
    pthread_mutex_lock(&lock);
    int count = hanging;
    pthread_mutex_unlock(&lock);
    return count;
}

EXTENSION void simcuda_release(void) {
    pthread_mutex_lock(&lock);
    releases++;
    for (int i = 0; i < call_count; i++)
        if (calls[i].trouble == INJECTED_HANG) calls[i].wait = 0; // those to come are called off
    pthread_cond_broadcast(&changed);
    pthread_mutex_unlock(&lock);
}

EXTENSION int simcuda_calls(int index, const char **name) {
    pthread_mutex_lock(&lock);
    int count = -1;
    if (index < call_count) {
        *name = calls[index].name;
        count = calls[index].count;
    }
    pthread_mutex_unlock(&lock);
    return count;
}

// ------------------------------------------------------------ the timeline
typedef struct { double begin, end; int64_t size; int engine, stream; } span_t;
static span_t *spans;
static size_t span_count, span_room;

void trace(enum engine engine, stream_t *stream, double begin, double end, size_t size) { // locked
    if (span_count < span_room) spans[span_count++] = (span_t){begin, end, (int64_t)size, engine, stream->id};
}

// Begin anew with room for so many spans; 0 ends it. What comes after the last is dropped.
EXTENSION void simcuda_trace(size_t room) {
    pthread_mutex_lock(&lock);
    free(spans);
    spans = room ? malloc(room * sizeof *spans) : NULL;
    span_count = 0;
    span_room = spans ? room : 0;
    pthread_mutex_unlock(&lock);
}

EXTENSION size_t simcuda_spans(span_t *result, size_t room) {
    pthread_mutex_lock(&lock);
    size_t count = span_count < room ? span_count : room;
    if (count) memcpy(result, spans, count * sizeof *spans);
    pthread_mutex_unlock(&lock);
    return count;
}

// ------------------------------------------------- memory and host functions
EXTENSION void *simcuda_store(CUdeviceptr pointer, size_t size) {
    pthread_mutex_lock(&lock);
    void *store = store_of((void *)pointer, size);
    pthread_mutex_unlock(&lock);
    return store;
}

typedef struct { uint64_t pointer, size; } range_t;

// A kernel: a host function with the ranges that it reads, then those that it writes.
EXTENSION CUresult simcuda_launch(CUstream handle, host_function_t function, void *argument, const range_t *ranges,
                                  int reads, int writes) {
    ENTER(CONTEXT);
    for (int i = 0; i < reads + writes; i++)
        if (!allocation_at((void *)ranges[i].pointer, ranges[i].size)) LEAVE(CUDA_ERROR_ILLEGAL_ADDRESS);
    stream_t *stream = stream_of(handle);
    if (!stream) LEAVE(CUDA_ERROR_INVALID_HANDLE);
    operation_t *o = push(stream, LAUNCH);
    o->function = function;
    o->argument = argument;
    for (int i = 0; i < reads + writes; i++)
        note_access(stream, o->ticket, (void *)ranges[i].pointer, ranges[i].size, i >= reads, "kernel");
    LEAVE(CUDA_SUCCESS);
}

// Back to the usual settings; forget reports, spans, injected errors, counts of faults and calls, and a broken context.
// What is still allocated stays, and stays counted.
EXTENSION void simcuda_reset(void) {
    simcuda_release();
    simcuda_trace(0);
    pthread_mutex_lock(&lock);
    settings = usual;
    counts.races = counts.violations = counts.hazards = 0;
    report_count = 0;
    for (int i = 0; i < call_count; i++) calls[i].count = calls[i].wait = 0;
    broken = CUDA_SUCCESS;
    pthread_mutex_unlock(&lock);
}
