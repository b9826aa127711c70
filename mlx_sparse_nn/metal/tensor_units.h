// The tensor units of an M5, which Metal 4 has. No older system compiles this, nor is it asked to.

#if __METAL_VERSION__ < 400
#error "the tensor units need Metal 4: macOS 26.2 or later"
#endif
#include <metal_tensor>
#include <MetalPerformancePrimitives/MetalPerformancePrimitives.h>
