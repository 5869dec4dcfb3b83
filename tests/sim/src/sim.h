// A CPU stand-in for the CUDA driver library, to test stream schedulers without a GPU.
//
//   memory.c    device memory that the host cannot touch, pinned memory that it must not touch too early
//   race.c      vector clocks over streams, events and host waits: finds a missing wait whatever the timing was
//   streams.c   one worker thread per stream, engines that take turns, the time that work takes
//   control.c   what tests say and ask: settings, injected errors and hangs, counts, the timeline
//   api.c       the driver's entry points for devices, contexts, streams and events
//   api_copy.c  the driver's entry points for memory and copies
//
// One lock guards everything; a function that says "locked" wants it held.
#pragma once
#define _GNU_SOURCE
#include <cuda.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#define API __attribute__((visibility("default"))) CUresult CUDAAPI
#define EXTENSION __attribute__((visibility("default")))
#define MAX_STREAMS 256 // at once
#define PAGE 4096UL

typedef struct { uint32_t ticket[MAX_STREAMS]; } vclock_t; // per stream id: the last ticket known to have happened

// An access by queued work, kept until the host has waited for it.
typedef struct access {
    struct access *next;
    int stream;
    uint32_t ticket;
    size_t low, high; // bytes from the allocation's base
    int writes;
    const char *what;
} access_t;

enum kind { DEVICE, PINNED };

typedef struct allocation {
    struct allocation *next;
    char *base, *store; // what callers hold, and where the bytes are; the same bytes twice for pinned memory
    size_t size, mapped;
    enum kind kind;
    int live;
    unsigned flags;
    access_t *accesses;
} allocation_t;

// One recording of an event; shared by the event and by whatever waits for it.
typedef struct { int references, done; double time; vclock_t clock; } record_t;

enum stage { HTOD, DTOH, DTOD, MEMSET, LAUNCH, RECORD, WAIT, STAGES };
enum engine { UPLOAD, DOWNLOAD, COMPUTE, ENGINES }; // work on one engine takes turns, first come first served

typedef int (*host_function_t)(void *); // nonzero: the kernel failed

typedef struct { struct CUstream_st *stream; uint32_t ticket; } dependency_t;

typedef struct operation {
    struct operation *next;
    enum stage stage;
    uint32_t ticket;
    double submitted;
    dependency_t *dependencies; // of the legacy default stream
    int dependency_count;
    char *target;
    const char *source;
    size_t size;
    char *staged; // a copy of pageable memory, taken at the call
    unsigned value, width;
    record_t *record;
    host_function_t function;
    void *argument;
} operation_t;

struct CUstream_st {
    struct CUstream_st *next;
    operation_t *head, *tail;
    uint32_t submitted, completed; // tickets
    double ready;                  // when the last operation ended, on the device's own time
    unsigned flags;
    int live, id;
    uint64_t random;
    vclock_t clock;
};
struct CUevent_st { int live; unsigned flags; record_t *record; };
struct CUctx_st { int references, device, primary, live, life, pushed; };
typedef struct CUstream_st stream_t;

typedef struct {
    double htod_us, dtoh_us, dtod_us, launch_us; // on top of what the work itself takes
    double gbps, jitter_us;                      // bandwidth of copies; 0: unlimited
    double memory, devices, guard, race, seed;
} settings_t;

typedef struct {
    int races, violations, hazards;
    int device, pinned, contexts, pushed, streams, events;
    int64_t device_bytes;
} counts_t;

extern settings_t settings;
extern counts_t counts;
extern CUresult broken; // what a failed kernel left behind: every later call says it
extern pthread_mutex_t lock;
extern pthread_cond_t changed;
extern allocation_t *allocations;
extern stream_t *streams; // live ones, and dead ones whose queue is not empty yet
extern int stream_ids;    // ids ever used
extern uint32_t done_ticket[MAX_STREAMS];
extern vclock_t host_clock;
extern stream_t default_stream;
extern int default_started;
extern __thread int in_host_function;

// memory.c
allocation_t *allocation_at(const void *pointer, size_t size);
int in_known_range(const char *pointer);
char *store_of(const void *pointer, size_t size);
CUresult allocate(size_t size, enum kind kind, unsigned flags, void **base);
CUresult release(void *base, enum kind kind);
void unmap_finished(void);
void reguard(allocation_t *allocation);
void install_guard(void);

// race.c
void join_clock(vclock_t *into, const vclock_t *from);
void host_waited_for(const vclock_t *clock);
void note_access(stream_t *stream, uint32_t ticket, const void *pointer, size_t size, int writes, const char *what);

// streams.c
double now(void);
int start_stream(stream_t *stream, unsigned flags); // locked; 0: there are too many
stream_t *stream_of(CUstream handle); // NULL: no such stream
operation_t *push(stream_t *stream, enum stage stage);
void wait_for(stream_t *stream, uint32_t ticket);
void wait_for_all(void);
void drop_record(record_t *record);

// control.c
void report(const char *format, ...) __attribute__((format(printf, 1, 2)));
CUresult injected(const char *call); // locked; counts the call
#define INJECTED_HANG (-1)
int injected_at_stage(enum stage stage); // locked; a CUresult, or INJECTED_HANG after having hung here
void trace(enum engine engine, stream_t *stream, double begin, double end, size_t size);

// api.c: every entry point begins with one of these and ends with LEAVE
enum needs { NOTHING, DRIVER, CONTEXT, FREEING };
CUresult enter(const char *name, enum needs needs);
#define ENTER(needs)                              \
    do {                                          \
        CUresult entered = enter(__func__, needs); \
        if (entered) return entered;              \
    } while (0)
#define LEAVE(result)                   \
    do {                                \
        CUresult leaving = (result);    \
        pthread_mutex_unlock(&lock);    \
        return leaving;                 \
    } while (0)
