// Entry points for memory and copies.
#include "sim.h"

API cuMemAlloc(CUdeviceptr *pointer, size_t size) {
    ENTER(CONTEXT);
    LEAVE(allocate(size, DEVICE, 0, (void **)pointer));
}

API cuMemFree(CUdeviceptr pointer) {
    ENTER(FREEING);
    CUresult result = pointer ? release((void *)pointer, DEVICE) : CUDA_SUCCESS;
    LEAVE(result ? result : broken);
}

API cuMemGetInfo(size_t *available, size_t *total) {
    ENTER(CONTEXT);
    *total = (size_t)settings.memory;
    *available = *total - (size_t)counts.device_bytes;
    LEAVE(CUDA_SUCCESS);
}

API cuMemHostAlloc(void **pointer, size_t size, unsigned flags) {
    ENTER(CONTEXT);
    LEAVE(allocate(size, PINNED, flags, pointer));
}

API cuMemAllocHost(void **pointer, size_t size) {
    ENTER(CONTEXT);
    LEAVE(allocate(size, PINNED, 0, pointer));
}

API cuMemFreeHost(void *pointer) {
    ENTER(FREEING);
    CUresult result = release(pointer, PINNED);
    LEAVE(result ? result : broken);
}

API cuMemHostGetFlags(unsigned *flags, void *pointer) {
    ENTER(CONTEXT);
    allocation_t *a = allocation_at(pointer, 1);
    if (!a || a->kind != PINNED) LEAVE(CUDA_ERROR_INVALID_VALUE);
    *flags = a->flags;
    LEAVE(CUDA_SUCCESS);
}

// Where a copy's end lies and whether it is memory that queued work may use later.
typedef struct { char *store; int known; } place_t;

static place_t place_of(const void *pointer, size_t size, int on_device) {
    allocation_t *a = allocation_at(pointer, size);
    if (a) return (place_t){on_device || a->kind == PINNED ? store_of(pointer, size) : NULL, 1};
    if (on_device || in_known_range(pointer)) return (place_t){NULL, 0}; // unknown, freed, or past the end
    return (place_t){(char *)pointer, 0}; // pageable
}

static const char *const labels[STAGES] = {[HTOD] = "copy to device", [DTOH] = "copy to host", [DTOD] = "copy"};

// The synchronous copies wait; so does an asynchronous one to pageable memory, whereas one from pageable memory takes
// a copy at the call. Pinned memory also is known on the device, at the same address.
static CUresult copy(enum stage stage, void *target, const void *source, size_t size, CUstream handle, int wait) {
    if (!size) return CUDA_SUCCESS;
    place_t to = place_of(target, size, stage != DTOH), from = place_of(source, size, stage != HTOD);
    if (!to.store || !from.store) return CUDA_ERROR_INVALID_VALUE;
    stream_t *stream = stream_of(handle);
    if (!stream) return CUDA_ERROR_INVALID_HANDLE;
    operation_t *o = push(stream, stage);
    o->target = to.store, o->source = from.store, o->size = size;
    if (!from.known) {
        o->staged = malloc(size);
        memcpy(o->staged, source, size);
    }
    if (from.known) note_access(stream, o->ticket, source, size, 0, labels[stage]);
    if (to.known) note_access(stream, o->ticket, target, size, 1, labels[stage]);
    if (!wait && to.known) return CUDA_SUCCESS;
    vclock_t reached = stream->clock;
    wait_for(stream, reached.ticket[stream->id]); // the operation may be gone by then
    host_waited_for(&reached);
    return broken;
}

API cuMemcpyHtoD(CUdeviceptr target, const void *source, size_t size) {
    ENTER(CONTEXT);
    LEAVE(copy(HTOD, (void *)target, source, size, NULL, 1));
}

API cuMemcpyDtoH(void *target, CUdeviceptr source, size_t size) {
    ENTER(CONTEXT);
    LEAVE(copy(DTOH, target, (void *)source, size, NULL, 1));
}

API cuMemcpyDtoD(CUdeviceptr target, CUdeviceptr source, size_t size) {
    ENTER(CONTEXT);
    LEAVE(copy(DTOD, (void *)target, (void *)source, size, NULL, 1));
}

API cuMemcpyHtoDAsync(CUdeviceptr target, const void *source, size_t size, CUstream stream) {
    ENTER(CONTEXT);
    LEAVE(copy(HTOD, (void *)target, source, size, stream, 0));
}

API cuMemcpyDtoHAsync(void *target, CUdeviceptr source, size_t size, CUstream stream) {
    ENTER(CONTEXT);
    LEAVE(copy(DTOH, target, (void *)source, size, stream, 0));
}

API cuMemcpyDtoDAsync(CUdeviceptr target, CUdeviceptr source, size_t size, CUstream stream) {
    ENTER(CONTEXT);
    LEAVE(copy(DTOD, (void *)target, (void *)source, size, stream, 0));
}

static CUresult fill(CUdeviceptr target, unsigned value, unsigned width, size_t count, CUstream handle) {
    char *store = allocation_at((void *)target, count * width) ? store_of((void *)target, count * width) : NULL;
    if (!store) return CUDA_ERROR_INVALID_VALUE;
    stream_t *stream = stream_of(handle);
    if (!stream) return CUDA_ERROR_INVALID_HANDLE;
    operation_t *o = push(stream, MEMSET);
    o->target = store, o->size = count * width, o->value = value, o->width = width;
    note_access(stream, o->ticket, (void *)target, o->size, 1, "fill");
    return CUDA_SUCCESS;
}

API cuMemsetD8(CUdeviceptr target, unsigned char value, size_t count) {
    ENTER(CONTEXT);
    LEAVE(fill(target, value, 1, count, NULL));
}

API cuMemsetD32(CUdeviceptr target, unsigned value, size_t count) {
    ENTER(CONTEXT);
    LEAVE(fill(target, value, 4, count, NULL));
}

API cuMemsetD8Async(CUdeviceptr target, unsigned char value, size_t count, CUstream stream) {
    ENTER(CONTEXT);
    LEAVE(fill(target, value, 1, count, stream));
}

API cuMemsetD32Async(CUdeviceptr target, unsigned value, size_t count, CUstream stream) {
    ENTER(CONTEXT);
    LEAVE(fill(target, value, 4, count, stream));
}
