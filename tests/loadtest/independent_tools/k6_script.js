// k6's part: ModelInfer at a constant rate of arrivals, the requests in turn, the summary as JSON.
import exec from 'k6/execution';
import grpc from 'k6/net/grpc';

const load = JSON.parse(__ENV.LOAD);
const client = new grpc.Client();
client.load([load.protos], 'serve/pb/grpc_service.proto');
let connected = false;

export const options = {
  scenarios: {
    load: {
      executor: 'constant-arrival-rate',
      rate: Math.round(load.rate * 1000),
      timeUnit: '1000s',
      duration: `${load.seconds}s`,
      preAllocatedVUs: load.most_under_way,
    },
  },
  summaryTrendStats: ['med', 'p(99)'],
};

export default function () {
  if (!connected) {
    // Not above: a connection belongs to a virtual user.
    client.connect(load.url, { plaintext: true });
    connected = true;
  }
  const raw = load.requests[exec.scenario.iterationInTest % load.requests.length];
  const answer = client.invoke('inference.GRPCInferenceService/ModelInfer', {
    model_name: load.model,
    inputs: [{ name: load.input, datatype: 'INT64', shape: [1] }],
    raw_input_contents: [raw],
  });
  if (answer.status !== grpc.StatusOK) {
    exec.test.abort(`status ${answer.status}: ${JSON.stringify(answer.error)}`);
  }
}

export function handleSummary(data) {
  return { stdout: JSON.stringify(data.metrics) };
}
