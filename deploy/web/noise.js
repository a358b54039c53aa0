// Noise as a pure function of its position; README.md defines it for other languages.

// MurmurHash3_x86_32 (Austin Appleby) over 32-bit words.
export function murmur3(seed, ...words) {
  let hash = seed;
  for (const word of words) {
    hash ^= Math.imul(rotated(Math.imul(word, 0xcc9e2d51), 15), 0x1b873593);
    hash = Math.imul(rotated(hash, 13), 5) + 0xe6546b64;
  }
  hash ^= 4 * words.length;
  hash = Math.imul(hash ^ (hash >>> 16), 0x85ebca6b);
  hash = Math.imul(hash ^ (hash >>> 13), 0xc2b2ae35);
  return (hash ^ (hash >>> 16)) >>> 0;
}

const rotated = (word, by) => (word << by) | (word >>> (32 - by));

// Standard normal float32 values (Box-Muller). step 0: the initial noise; 1, 2, ...: the noise added in that step.
export function normal(seed, image, step, size) {
  return Float32Array.from({ length: size }, (_, place) => {
    const [u, v] = [2 * place, 2 * place + 1].map((word) => murmur3(seed, image, step, word) / 2 ** 32);
    return Math.sqrt(-2 * Math.log(u + 2 ** -32)) * Math.cos(2 * Math.PI * v); // avoids log(0)
  });
}
