// Entry points for devices, contexts, streams and events, as far as the product uses them and pycuda itself does.
// Every other symbol of the library answers CUDA_ERROR_NOT_SUPPORTED.
#include "sim.h"

#define DEVICES 8
static int started;
static struct CUctx_st primary[DEVICES];
static __thread CUcontext current[32]; // the calling thread's stack of contexts
static __thread int lives[32];         // which life of each it was: a primary context is freed, and made anew
static __thread int depth;

CUresult enter(const char *name, enum needs needs) {
    if (in_host_function) return CUDA_ERROR_NOT_PERMITTED;
    pthread_mutex_lock(&lock);
    CUresult trouble = injected(name);
    if (trouble) LEAVE(trouble);
    if (needs >= DRIVER && !started) LEAVE(CUDA_ERROR_NOT_INITIALIZED);
    if (needs >= CONTEXT && !depth) LEAVE(CUDA_ERROR_INVALID_CONTEXT);
    if (needs >= CONTEXT && !current[depth - 1]->live) LEAVE(CUDA_ERROR_CONTEXT_IS_DESTROYED);
    if (needs == CONTEXT && broken) LEAVE(broken); // what is freed is freed all the same
    return CUDA_SUCCESS;
}

API cuInit(unsigned flags) {
    ENTER(NOTHING);
    if (flags) LEAVE(CUDA_ERROR_INVALID_VALUE);
    if (settings.devices < 1) LEAVE(CUDA_ERROR_NO_DEVICE);
    if (!started) install_guard();
    started = 1;
    LEAVE(CUDA_SUCCESS);
}

API cuDriverGetVersion(int *version) {
    *version = CUDA_VERSION;
    return CUDA_SUCCESS;
}

static const struct { CUresult code; const char *name, *text; } errors[] = {
    {CUDA_SUCCESS, "CUDA_SUCCESS", "no error"},
    {CUDA_ERROR_INVALID_VALUE, "CUDA_ERROR_INVALID_VALUE", "invalid argument"},
    {CUDA_ERROR_OUT_OF_MEMORY, "CUDA_ERROR_OUT_OF_MEMORY", "out of memory"},
    {CUDA_ERROR_NOT_INITIALIZED, "CUDA_ERROR_NOT_INITIALIZED", "initialization error"},
    {CUDA_ERROR_NO_DEVICE, "CUDA_ERROR_NO_DEVICE", "no CUDA-capable device is detected"},
    {CUDA_ERROR_INVALID_DEVICE, "CUDA_ERROR_INVALID_DEVICE", "invalid device ordinal"},
    {CUDA_ERROR_INVALID_CONTEXT, "CUDA_ERROR_INVALID_CONTEXT", "invalid device context"},
    {CUDA_ERROR_ECC_UNCORRECTABLE, "CUDA_ERROR_ECC_UNCORRECTABLE", "uncorrectable ECC error encountered"},
    {CUDA_ERROR_INVALID_HANDLE, "CUDA_ERROR_INVALID_HANDLE", "invalid resource handle"},
    {CUDA_ERROR_NOT_FOUND, "CUDA_ERROR_NOT_FOUND", "named symbol not found"},
    {CUDA_ERROR_NOT_READY, "CUDA_ERROR_NOT_READY", "device not ready"},
    {CUDA_ERROR_ILLEGAL_ADDRESS, "CUDA_ERROR_ILLEGAL_ADDRESS", "an illegal memory access was encountered"},
    {CUDA_ERROR_CONTEXT_IS_DESTROYED, "CUDA_ERROR_CONTEXT_IS_DESTROYED", "context is destroyed"},
    {CUDA_ERROR_LAUNCH_FAILED, "CUDA_ERROR_LAUNCH_FAILED", "unspecified launch failure"},
    {CUDA_ERROR_NOT_PERMITTED, "CUDA_ERROR_NOT_PERMITTED", "operation not permitted"},
    {CUDA_ERROR_NOT_SUPPORTED, "CUDA_ERROR_NOT_SUPPORTED", "operation not supported"},
    {CUDA_ERROR_UNKNOWN, "CUDA_ERROR_UNKNOWN", "unknown error"},
};

API cuGetErrorString(CUresult code, const char **text) {
    for (size_t i = 0; i < sizeof errors / sizeof *errors; i++)
        if (errors[i].code == code) {
            *text = errors[i].text;
            return CUDA_SUCCESS;
        }
    *text = NULL;
    return CUDA_ERROR_INVALID_VALUE;
}

API cuGetErrorName(CUresult code, const char **name) {
    for (size_t i = 0; i < sizeof errors / sizeof *errors; i++)
        if (errors[i].code == code) {
            *name = errors[i].name;
            return CUDA_SUCCESS;
        }
    *name = NULL;
    return CUDA_ERROR_INVALID_VALUE;
}

// ------------------------------------------------------------------ devices
static int is_device(int device) { return device >= 0 && device < settings.devices && device < DEVICES; }

API cuDeviceGetCount(int *count) {
    ENTER(DRIVER);
    *count = (int)settings.devices;
    LEAVE(CUDA_SUCCESS);
}

API cuDeviceGet(CUdevice *device, int ordinal) {
    ENTER(DRIVER);
    if (!is_device(ordinal)) LEAVE(CUDA_ERROR_INVALID_DEVICE);
    *device = ordinal;
    LEAVE(CUDA_SUCCESS);
}

API cuDeviceGetName(char *name, int room, CUdevice device) {
    ENTER(DRIVER);
    if (!is_device(device)) LEAVE(CUDA_ERROR_INVALID_DEVICE);
    snprintf(name, room, "simulated CUDA device");
    LEAVE(CUDA_SUCCESS);
}

API cuDeviceTotalMem(size_t *size, CUdevice device) {
    ENTER(DRIVER);
    if (!is_device(device)) LEAVE(CUDA_ERROR_INVALID_DEVICE);
    *size = (size_t)settings.memory;
    LEAVE(CUDA_SUCCESS);
}

API cuDeviceComputeCapability(int *major, int *minor, CUdevice device) {
    ENTER(DRIVER);
    if (!is_device(device)) LEAVE(CUDA_ERROR_INVALID_DEVICE);
    *major = 8;
    *minor = 9;
    LEAVE(CUDA_SUCCESS);
}

API cuDeviceGetPCIBusId(char *text, int room, CUdevice device) {
    ENTER(DRIVER);
    if (!is_device(device)) LEAVE(CUDA_ERROR_INVALID_DEVICE);
    snprintf(text, room, "0000:%02x:00.0", device);
    LEAVE(CUDA_SUCCESS);
}

API cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
    ENTER(DRIVER);
    if (!is_device(device)) LEAVE(CUDA_ERROR_INVALID_DEVICE);
    switch ((int)attribute) {
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = 8; break;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *value = 9; break;
    case CU_DEVICE_ATTRIBUTE_ASYNC_ENGINE_COUNT: *value = 2; break;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = 16; break;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *value = 32; break;
    case CU_DEVICE_ATTRIBUTE_GPU_OVERLAP:
    case CU_DEVICE_ATTRIBUTE_CONCURRENT_KERNELS:
    case CU_DEVICE_ATTRIBUTE_UNIFIED_ADDRESSING:
    case CU_DEVICE_ATTRIBUTE_CAN_MAP_HOST_MEMORY: *value = 1; break;
    default: *value = 0;
    }
    LEAVE(CUDA_SUCCESS);
}

// ----------------------------------------------------------------- contexts
API cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
    ENTER(DRIVER);
    if (!is_device(device)) LEAVE(CUDA_ERROR_INVALID_DEVICE);
    struct CUctx_st *c = &primary[device];
    if (!c->references++) counts.contexts++;
    c->live = 1;
    *context = c;
    LEAVE(CUDA_SUCCESS);
}

API cuDevicePrimaryCtxRelease(CUdevice device) {
    ENTER(DRIVER);
    if (!is_device(device) || !primary[device].references) LEAVE(CUDA_ERROR_INVALID_CONTEXT);
    if (!--primary[device].references) {
        primary[device].live = 0;
        counts.contexts--;
        // Unlike cuCtxDestroy it pops nothing, in no thread: what is left there names a context that is no more.
        counts.pushed -= primary[device].pushed;
        primary[device].pushed = 0;
        primary[device].life++;
        broken = CUDA_SUCCESS; // the next one is a new one
    }
    LEAVE(CUDA_SUCCESS);
}

// For contexts made by cuCtxCreate, of which there are none. pycuda calls it nevertheless when it drops its object of a
// primary context, in place of cuDevicePrimaryCtxRelease.
API cuCtxDetach(CUcontext context) {
    ENTER(DRIVER);
    (void)context;
    LEAVE(CUDA_ERROR_INVALID_CONTEXT);
}

API cuCtxPushCurrent(CUcontext context) {
    ENTER(DRIVER);
    if (!context || !context->live || depth >= 32) LEAVE(CUDA_ERROR_INVALID_CONTEXT);
    lives[depth] = context->life;
    current[depth++] = context;
    context->pushed++;
    counts.pushed++;
    LEAVE(CUDA_SUCCESS);
}

API cuCtxPopCurrent(CUcontext *context) {
    ENTER(DRIVER);
    if (!depth) LEAVE(CUDA_ERROR_INVALID_CONTEXT);
    depth--;
    if (lives[depth] == current[depth]->life) {
        current[depth]->pushed--;
        counts.pushed--;
    }
    if (context) *context = current[depth];
    LEAVE(CUDA_SUCCESS);
}

API cuCtxGetCurrent(CUcontext *context) {
    ENTER(DRIVER);
    *context = depth ? current[depth - 1] : NULL;
    LEAVE(CUDA_SUCCESS);
}

API cuCtxGetDevice(CUdevice *device) {
    ENTER(CONTEXT);
    *device = (CUdevice)(current[depth - 1] - primary);
    LEAVE(CUDA_SUCCESS);
}

API cuCtxGetApiVersion(CUcontext context, unsigned *version) {
    ENTER(DRIVER);
    if (context && !context->live) LEAVE(CUDA_ERROR_INVALID_CONTEXT);
    *version = CUDA_VERSION;
    LEAVE(CUDA_SUCCESS);
}

API cuCtxSynchronize(void) {
    ENTER(CONTEXT);
    wait_for_all();
    LEAVE(broken);
}

// ------------------------------------------------------------------ streams
API cuStreamCreate(CUstream *handle, unsigned flags) {
    ENTER(CONTEXT);
    if (flags > CU_STREAM_NON_BLOCKING) LEAVE(CUDA_ERROR_INVALID_VALUE);
    stream_t *stream = malloc(sizeof *stream); // never freed: a stale handle is known as one
    if (!start_stream(stream, flags)) LEAVE(CUDA_ERROR_OUT_OF_MEMORY);
    counts.streams++;
    *handle = stream;
    LEAVE(CUDA_SUCCESS);
}

API cuStreamDestroy(CUstream handle) { // queued work still runs
    ENTER(FREEING);
    if (!handle || !handle->live) LEAVE(CUDA_ERROR_INVALID_HANDLE);
    handle->live = 0;
    counts.streams--;
    pthread_cond_broadcast(&changed);
    LEAVE(broken);
}

API cuStreamSynchronize(CUstream handle) {
    ENTER(CONTEXT);
    stream_t *stream = stream_of(handle);
    if (!stream) LEAVE(CUDA_ERROR_INVALID_HANDLE);
    vclock_t reached = stream->clock;
    wait_for(stream, stream->submitted);
    host_waited_for(&reached);
    LEAVE(broken);
}

API cuStreamQuery(CUstream handle) {
    ENTER(CONTEXT);
    stream_t *stream = stream_of(handle);
    if (!stream) LEAVE(CUDA_ERROR_INVALID_HANDLE);
    if (stream->completed < stream->submitted) LEAVE(CUDA_ERROR_NOT_READY);
    host_waited_for(&stream->clock);
    LEAVE(CUDA_SUCCESS);
}

API cuStreamWaitEvent(CUstream handle, CUevent event, unsigned flags) {
    ENTER(CONTEXT);
    stream_t *stream = stream_of(handle);
    if (!stream || !event || !event->live) LEAVE(CUDA_ERROR_INVALID_HANDLE);
    if (flags) LEAVE(CUDA_ERROR_INVALID_VALUE);
    if (event->record) { // an event that was never recorded is no wait
        operation_t *o = push(stream, WAIT);
        o->record = event->record;
        o->record->references++;
        join_clock(&stream->clock, &event->record->clock);
    }
    LEAVE(CUDA_SUCCESS);
}

// ------------------------------------------------------------------- events
API cuEventCreate(CUevent *event, unsigned flags) {
    ENTER(CONTEXT);
    *event = calloc(1, sizeof **event); // never freed: a stale handle is known as one
    (*event)->live = 1;
    (*event)->flags = flags;
    counts.events++;
    LEAVE(CUDA_SUCCESS);
}

API cuEventDestroy(CUevent event) {
    ENTER(FREEING);
    if (!event || !event->live) LEAVE(CUDA_ERROR_INVALID_HANDLE);
    event->live = 0;
    drop_record(event->record);
    counts.events--;
    LEAVE(broken);
}

API cuEventRecord(CUevent event, CUstream handle) {
    ENTER(CONTEXT);
    stream_t *stream = stream_of(handle);
    if (!stream || !event || !event->live) LEAVE(CUDA_ERROR_INVALID_HANDLE);
    drop_record(event->record);
    event->record = calloc(1, sizeof *event->record);
    event->record->references = 2; // the event's and the stream's
    push(stream, RECORD)->record = event->record;
    event->record->clock = stream->clock;
    LEAVE(CUDA_SUCCESS);
}

API cuEventQuery(CUevent event) {
    ENTER(CONTEXT);
    if (!event || !event->live) LEAVE(CUDA_ERROR_INVALID_HANDLE);
    if (event->record && !event->record->done) LEAVE(CUDA_ERROR_NOT_READY);
    if (event->record) host_waited_for(&event->record->clock);
    LEAVE(CUDA_SUCCESS);
}

API cuEventSynchronize(CUevent event) {
    ENTER(CONTEXT);
    if (!event || !event->live) LEAVE(CUDA_ERROR_INVALID_HANDLE);
    record_t *record = event->record;
    if (record) {
        record->references++;
        while (!record->done) pthread_cond_wait(&changed, &lock);
        host_waited_for(&record->clock);
        drop_record(record);
    }
    LEAVE(broken);
}

#undef cuEventElapsedTime
static CUresult elapsed(float *milliseconds, CUevent from, CUevent to) { // locked
    if (!from || !to || !from->live || !to->live || !from->record || !to->record) return CUDA_ERROR_INVALID_HANDLE;
    if ((from->flags | to->flags) & CU_EVENT_DISABLE_TIMING) return CUDA_ERROR_INVALID_HANDLE;
    if (!from->record->done || !to->record->done) return CUDA_ERROR_NOT_READY;
    *milliseconds = (float)((to->record->time - from->record->time) * 1e3);
    return CUDA_SUCCESS;
}

API cuEventElapsedTime(float *milliseconds, CUevent from, CUevent to) {
    ENTER(CONTEXT);
    LEAVE(elapsed(milliseconds, from, to));
}

API cuEventElapsedTime_v2(float *milliseconds, CUevent from, CUevent to) {
    ENTER(CONTEXT);
    LEAVE(elapsed(milliseconds, from, to));
}
