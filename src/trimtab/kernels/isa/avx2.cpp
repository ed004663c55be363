// Compiled with the flags that CMakeLists.txt gives to avx2.
#define ISA avx2
#define TRIMTAB_ISA avx2
#define TRIMTAB_NAME "avx2"
#define TRIMTAB_TABLE avx2_kernels
#include <iterator>

#include "table.inc"
