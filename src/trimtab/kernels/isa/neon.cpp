// Compiled with the flags that CMakeLists.txt gives to neon.
#define ISA neon
#define TRIMTAB_ISA neon
#define TRIMTAB_NAME "neon"
#define TRIMTAB_TABLE neon_kernels
#include <iterator>

#include "table.inc"
