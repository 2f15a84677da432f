// Streams text from Baton and goes on where it was when a scheduler dies: nothing is lost, nothing comes twice.
//
//   npm install
//   node resume.js 127.0.0.1:50051,127.0.0.1:50061 '{"text": "def mean(values):", "stop": {"max_tokens": 200}}'
//
// The second argument is a baton.v1.GenerateRequest as JSON, with the names of generation.proto.
import { setTimeout as sleep } from 'node:timers/promises';
import { fileURLToPath } from 'node:url';
import grpc from '@grpc/grpc-js';
import loader from '@grpc/proto-loader';

const PROTOS = fileURLToPath(new URL('../../../protos/', import.meta.url));
const CHANNEL = {
  'grpc.keepalive_time_ms': 10_000, // finds out that a machine has vanished without a word
  'grpc.keepalive_timeout_ms': 5_000,
  'grpc.max_receive_message_length': 32 * 1024 * 1024,
};
const ATTEMPTS = 20; // without a new token in between

export function connect(targets, credentials = grpc.credentials.createInsecure()) {
  // Numbers of 64 bits are texts: a seed does not fit into a double.
  const options = { keepCase: true, longs: String, enums: String, defaults: true, oneofs: true, includeDirs: [PROTOS] };
  const { baton } = grpc.loadPackageDefinition(loader.loadSync('baton_protos/generation.proto', options));
  return targets.map((target) => new baton.v1.Generation(target, credentials, CHANNEL));
}

/** Yields the text of one sample, piece by piece; returns the stream's last message and how often it broke. */
export async function* generate(clients, request) {
  const tokenIds = [];
  let start = null; // the first message of the first call: what another scheduler has to know
  let textOffset = 0; // in code points, not in the UTF-16 units of JavaScript's strings
  let failures = 0;
  for (let interruptions = 0; ; interruptions++) {
    const call = clients[interruptions % clients.length].GenerateStream(
      start ? continuation(request, start, tokenIds, textOffset) : request,
    );
    try {
      for await (const message of call) {
        if (message.event === 'start') {
          if (start && start.model_fingerprint !== message.start.model_fingerprint) {
            console.error('another model, or other kernels: from here on the output may differ');
          }
          start ??= message.start;
        } else if (message.event === 'chunk') {
          const { token_index, token_ids, text, text_offset } = message.chunk;
          if (token_index !== tokenIds.length || text_offset !== textOffset) throw new Error('a gap in the stream');
          tokenIds.push(...token_ids);
          textOffset += [...text].length;
          failures = 0;
          yield text;
        } else if (message.event === 'end') {
          return { end: message.end, interruptions };
        }
      }
      throw new Error('the stream ended without its last message');
    } catch (error) {
      if (!mayGoOn(error, start) || ++failures >= ATTEMPTS) throw error;
      await sleep(Math.min(100 * 2 ** (failures - 1), 2000) * (0.5 + Math.random() / 2));
    } finally {
      call.cancel(); // frees what the request holds when the reader stops early
    }
  }
}

/** The same request, for any scheduler of the same model: its seed, its prompt as token ids, and what has come. */
function continuation(request, start, tokenIds, textOffset) {
  const { text, chat, ...rest } = request; // the prompt is a oneof: its ids take the place of its text
  return {
    ...rest,
    request_id: start.request_id,
    token_ids: { ids: start.prompt_token_ids },
    sampling: { ...request.sampling, seed: start.seed },
    resume: [{ sample: 0, token_ids: tokenIds, text_offset: textOffset }],
  };
}

function mayGoOn(error, start) {
  // A scheduler that has not noticed yet that our connection broke still has the request under its name.
  return error.code === grpc.status.UNAVAILABLE || (start !== null && error.code === grpc.status.ALREADY_EXISTS);
}

async function main(targets, json) {
  const clients = connect(targets.split(','));
  const stream = generate(clients, JSON.parse(json));
  let step = await stream.next();
  for (; !step.done; step = await stream.next()) process.stdout.write(step.value);
  const { end, interruptions } = step.value;
  console.error(`\n${end.finish_reason}, ${end.usage.completion_tokens} tokens, continued ${interruptions} times`);
  clients.forEach((client) => client.close());
}

if (process.argv[1] === fileURLToPath(import.meta.url)) await main(...process.argv.slice(2));
