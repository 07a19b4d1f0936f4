import assert from 'node:assert/strict';
import { test } from 'node:test';

import { RefusedError, closedBy, isFinal } from '../src/catbus/errors.js';

test('another token helps after one that expired or was revoked', () => {
  for (const renewable of [true, false]) {
    for (const code of ['token_expired', 'revoked']) {
      assert.equal(isFinal(new RefusedError(code, 'over'), renewable), !renewable, code);
    }
    assert.equal(isFinal(new RefusedError('unauthenticated', 'never'), renewable), true);
    assert.equal(isFinal(new RefusedError('unavailable', 'later'), renewable), false);
    assert.equal(isFinal(closedBy(4403, 'revoked'), renewable), !renewable);
  }
});
