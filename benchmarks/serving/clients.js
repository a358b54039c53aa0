// The clients of service_compare.py: autocannon, with an address of its own for each client unless `shared`.
// Reads the settings as JSON from standard input, and prints counts and latencies of what came after the warm-up.
const autocannon = require('autocannon')
const { url, requests, clients, seconds, warm, shared } = JSON.parse(require('fs').readFileSync(0))

const milliseconds = [], statuses = {}, errors = {}
let number = 0, counting = 0, cpu
const since = began => (performance.now() - began) / 1000

const setupClient = client => {
  const address = shared ? {} : { 'X-Forwarded-For': `10.0.${number >> 8}.${number++ & 255}` }
  client.setRequests(requests.map(each => ({
    ...each, headers: { ...each.headers, ...address }, body: Buffer.from(each.body, 'base64')
  })))
}
const run = autocannon({ url, connections: clients, duration: seconds, timeout: 300, setupClient })
setTimeout(() => { counting = performance.now(); cpu = process.cpuUsage() }, 1000 * warm)
run.on('response', (client, status, bytes, took) => {
  if (!counting) return
  statuses[status] = (statuses[status] ?? 0) + 1
  if (status < 300) milliseconds.push(took)
})
run.on('reqError', error => { errors[error.message] = (errors[error.message] ?? 0) + 1 })
run.on('done', () => {
  const elapsed = since(counting), { user, system } = process.cpuUsage(cpu)
  milliseconds.sort((a, b) => a - b)
  const quantile = q => milliseconds[Math.min(milliseconds.length - 1, Math.floor(q * milliseconds.length))] ?? null
  console.log(JSON.stringify({
    requests_per_second: milliseconds.length / elapsed, p50_ms: quantile(0.5), p99_ms: quantile(0.99),
    seconds: elapsed, statuses, errors, clients_cpu: (user + system) / 1e6 / elapsed
  }))
})
