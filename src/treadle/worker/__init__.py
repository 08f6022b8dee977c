"""The worker: adapter slots, packing, cycle execution. It knows no HTTP, no SQL, no Ray and no wire format."""
