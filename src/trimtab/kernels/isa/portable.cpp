// Compiled with the flags that CMakeLists.txt gives to portable.
#define TRIMTAB_PLAIN
#define ISA portable
#define TRIMTAB_ISA portable
#define TRIMTAB_NAME "portable"
#define TRIMTAB_TABLE portable_kernels
#include <iterator>

#include "table.inc"
