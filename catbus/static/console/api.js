// Requests to the HTTP API of the broker.

/** The broker's refusal of a request. `status` is that of HTTP, `code` the protocol's. */
export class ApiError extends Error {
  constructor(status, { error, code }) {
    super(error);
    this.name = 'ApiError';
    this.status = status;
    this.code = code;
  }
}

/** A function that requests paths such as `api/replicas` with a token, and returns the JSON of the answer. */
export function apiWith(token) {
  return async (path, { method = 'GET', query = {}, body, signal } = {}) => {
    const url = new URL(path, document.baseURI);
    for (const [name, value] of Object.entries(query)) {
      if (value !== undefined && value !== null && value !== '') url.searchParams.set(name, value);
    }
    const response = await fetch(url, {
      method,
      signal,
      cache: 'no-store',
      headers: { authorization: `Bearer ${token}` },
      body: body === undefined ? undefined : JSON.stringify(body),
    });
    const answer = await response.json().catch(() => ({ error: `${path}: HTTP status ${response.status}` }));
    if (!response.ok) throw new ApiError(response.status, answer);
    return answer;
  };
}

/** Encode one segment of a path. */
export const segment = encodeURIComponent;
