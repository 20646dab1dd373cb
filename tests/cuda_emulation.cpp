#include "cuda_emulation.h"
#include "cuda/types.h"

extern "C" void panda_emulate_backwards(int on) { panda::emulation::backwards = on != 0; }
