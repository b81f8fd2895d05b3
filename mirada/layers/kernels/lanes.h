/* W floats at a time: what the files of such arithmetic share. Included by them once for each instruction set with W, FOR(name),
 * TARGET, FMA(a, b, c) = ab + c, and MAX(a, b) = a > b ? a : b and MIN(a, b) = a < b ? a : b of each lane defined. No header guard:
 * each inclusion makes functions of other names.
 */
#define LANES static inline __attribute__((always_inline)) TARGET

typedef float FOR(vec) __attribute__((vector_size(4 * W)));
typedef int32_t FOR(ivec) __attribute__((vector_size(4 * W)));
typedef uint32_t FOR(uvec) __attribute__((vector_size(4 * W)));
typedef uint16_t FOR(hvec) __attribute__((vector_size(2 * W)));
typedef int8_t FOR(bvec) __attribute__((vector_size(W)));
#define vec FOR(vec)
#define ivec FOR(ivec)
#define uvec FOR(uvec)
#define hvec FOR(hvec)
#define bvec FOR(bvec)

LANES vec FOR(load)(const float *p) {
    vec v;
    memcpy(&v, p, sizeof v);
    return v;
}

LANES void FOR(store)(float *p, vec v) { memcpy(p, &v, sizeof v); }

LANES vec FOR(all)(float x) { return x - (vec){0}; }

LANES vec FOR(pick)(ivec where, vec a, vec b) { return (vec)(((ivec)a & where) | ((ivec)b & ~where)); }

/* e^x within 2 units in the last place from -87.3 to 88.3, held at the ends outside. */
LANES vec FOR(exp)(vec x) {
    const vec low = FOR(all)(-87.3f), high = FOR(all)(88.3f), shift = FOR(all)(12582912.0f);
    x = MIN(high, MAX(low, x)); /* what is no number passes */
    vec shifted = FMA(x, FOR(all)(1.44269504f), shift); /* its low bits are the whole number of halvings */
    vec n = shifted - shift;
    vec r = FMA(n, FOR(all)(-0.693359375f), x);
    r = FMA(n, FOR(all)(2.12194440e-4f), r);
    vec p = FOR(all)(1.9875691500e-4f); /* Cephes, expf */
    p = FMA(p, r, FOR(all)(1.3981999507e-3f));
    p = FMA(p, r, FOR(all)(8.3334519073e-3f));
    p = FMA(p, r, FOR(all)(4.1665795894e-2f));
    p = FMA(p, r, FOR(all)(1.6666665459e-1f));
    p = FMA(p, r, FOR(all)(5.0000001201e-1f));
    p = FMA(p, r * r, r) + 1.0f;
    return (vec)((ivec)p + (((ivec)shifted - (ivec)shift) << 23));
}
