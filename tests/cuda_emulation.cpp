#include "cuda/types.h"
#include "cuda_emulation.h"

extern "C" void panda_emulate_backwards(int on) { panda::emulation::backwards = on != 0; }
