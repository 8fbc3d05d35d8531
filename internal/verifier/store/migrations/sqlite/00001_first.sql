-- +goose Up

-- Times are microseconds since 1970, 0 for none; digests hexadecimal where TEXT.

CREATE TABLE nodes (
  id             TEXT PRIMARY KEY,
  version        INTEGER NOT NULL,
  name           TEXT COLLATE BINARY NOT NULL,
  state          TEXT NOT NULL CHECK (state IN ('pending', 'active', 'revoked')),
  ek_digest      TEXT NOT NULL,
  ek_certificate BLOB,
  ek_trust       TEXT NOT NULL,
  ak_name        BLOB NOT NULL,
  ak             BLOB,
  bind_name      BLOB,
  bind           BLOB,
  certifier      BLOB,
  serial         TEXT NOT NULL,
  enrolled       INTEGER NOT NULL,
  problem        TEXT NOT NULL,
  approved_by    TEXT NOT NULL,
  revoked_why    TEXT NOT NULL,
  agent_address  TEXT NOT NULL
) STRICT;
CREATE UNIQUE INDEX nodes_name ON nodes (name) WHERE state <> 'revoked';
CREATE UNIQUE INDEX nodes_ek ON nodes (ek_digest) WHERE state <> 'revoked';
CREATE UNIQUE INDEX nodes_ak ON nodes (ak_name) WHERE state <> 'revoked';
CREATE INDEX nodes_by_name ON nodes (name, id);

CREATE TABLE tokens (
  digest   TEXT PRIMARY KEY,
  name     TEXT NOT NULL,
  expires  INTEGER NOT NULL,
  added_by TEXT NOT NULL,
  created  INTEGER NOT NULL,
  used     INTEGER NOT NULL,
  used_by  TEXT NOT NULL
) STRICT;

CREATE TABLE challenges (
  purpose TEXT NOT NULL,
  id      TEXT NOT NULL,
  source  TEXT NOT NULL,
  expires INTEGER NOT NULL,
  data    BLOB,
  PRIMARY KEY (purpose, id)
) STRICT;
CREATE INDEX challenges_source ON challenges (purpose, source);
CREATE INDEX challenges_expires ON challenges (expires);

-- A run of rounds with one result is one row. While it is the newest of its node,
-- last, count and expires are in node_state and not here.
CREATE TABLE rounds (
  id       INTEGER PRIMARY KEY AUTOINCREMENT,
  node     TEXT NOT NULL REFERENCES nodes (id),
  received INTEGER NOT NULL,
  last     INTEGER NOT NULL,
  expires  INTEGER NOT NULL,
  count    INTEGER NOT NULL,
  tier     INTEGER NOT NULL,
  affirmed INTEGER NOT NULL,
  vm_tiers BLOB,
  codes    BLOB,
  changes  BLOB,
  result   BLOB
) STRICT;
CREATE INDEX rounds_node ON rounds (node, id);
CREATE INDEX rounds_last ON rounds (last);
CREATE INDEX rounds_not_affirmed ON rounds (id) WHERE affirmed = 0;

CREATE TABLE round_vms (
  uuid  TEXT NOT NULL,
  round INTEGER NOT NULL REFERENCES rounds (id) ON DELETE CASCADE,
  PRIMARY KEY (uuid, round)
) STRICT, WITHOUT ROWID;
CREATE INDEX round_vms_round ON round_vms (round);

CREATE TABLE evidence (
  round    INTEGER PRIMARY KEY REFERENCES rounds (id) ON DELETE CASCADE,
  node     TEXT NOT NULL,
  received INTEGER NOT NULL,
  size     INTEGER NOT NULL,
  data     BLOB NOT NULL
) STRICT;
CREATE INDEX evidence_node ON evidence (node, round, size);
CREATE INDEX evidence_received ON evidence (received);

-- The one row that each round writes: small, and without an index besides its key.
CREATE TABLE node_state (
  node          TEXT PRIMARY KEY REFERENCES nodes (id),
  version       INTEGER NOT NULL,
  nonce         BLOB,
  nonce_expires INTEGER NOT NULL,
  round         INTEGER NOT NULL,
  received      INTEGER NOT NULL,
  expires       INTEGER NOT NULL,
  count         INTEGER NOT NULL,
  tier          INTEGER NOT NULL,
  vm_none       INTEGER NOT NULL,
  vm_affirming  INTEGER NOT NULL,
  vm_warning    INTEGER NOT NULL,
  vm_contra     INTEGER NOT NULL,
  result_digest BLOB,
  noticed       INTEGER NOT NULL
) STRICT;

CREATE TABLE checkpoints (
  node   TEXT PRIMARY KEY REFERENCES nodes (id),
  digest BLOB NOT NULL,
  data   BLOB NOT NULL
) STRICT;

CREATE TABLE vms (
  uuid      TEXT NOT NULL,
  node      TEXT NOT NULL REFERENCES nodes (id),
  name      TEXT NOT NULL,
  running   INTEGER NOT NULL,
  ek_digest TEXT NOT NULL,
  tier      INTEGER NOT NULL,
  changed   INTEGER NOT NULL,
  PRIMARY KEY (uuid, node)
) STRICT;
CREATE INDEX vms_node ON vms (node);
CREATE INDEX vms_ek ON vms (ek_digest) WHERE ek_digest <> '';

CREATE TABLE reference_values (
  id          INTEGER PRIMARY KEY AUTOINCREMENT,
  subject     TEXT NOT NULL,
  kind        TEXT NOT NULL,
  path        TEXT NOT NULL,
  digest      TEXT NOT NULL,
  source      TEXT NOT NULL,
  detail      TEXT NOT NULL,
  state       TEXT NOT NULL CHECK (state IN ('proposed', 'approved', 'rejected')),
  proposed_by TEXT NOT NULL,
  second      TEXT NOT NULL,
  four_eyes   INTEGER NOT NULL,
  time        INTEGER NOT NULL,
  identity    BLOB NOT NULL, -- SHA-256 over subject, kind, path, digest
  CONSTRAINT four_eyes CHECK (four_eyes = 0 OR state <> 'approved' OR (second <> '' AND second <> proposed_by))
) STRICT;
CREATE UNIQUE INDEX reference_values_once ON reference_values (identity) WHERE state <> 'rejected';
CREATE INDEX reference_values_subject ON reference_values (subject) WHERE state = 'approved';
CREATE INDEX reference_values_proposed ON reference_values (id) WHERE state = 'proposed';

CREATE TABLE value_versions (
  subject TEXT PRIMARY KEY,
  version INTEGER NOT NULL
) STRICT;

CREATE TABLE counters (
  name  TEXT PRIMARY KEY,
  value INTEGER NOT NULL
) STRICT;
INSERT INTO counters (name, value) VALUES ('values', 0);

CREATE TABLE settings (
  name    TEXT NOT NULL,
  version INTEGER NOT NULL,
  data    BLOB,
  set_by  TEXT NOT NULL,
  time    INTEGER NOT NULL,
  PRIMARY KEY (name, version)
) STRICT;

CREATE TABLE hooks (
  id      INTEGER PRIMARY KEY AUTOINCREMENT,
  url     TEXT NOT NULL,
  secret  BLOB,
  events  TEXT NOT NULL, -- JSON; [] for all
  created INTEGER NOT NULL
) STRICT;

CREATE TABLE deliveries (
  id       INTEGER PRIMARY KEY AUTOINCREMENT,
  hook     INTEGER NOT NULL REFERENCES hooks (id) ON DELETE CASCADE,
  event    TEXT NOT NULL,
  body     BLOB,
  attempts INTEGER NOT NULL,
  due      INTEGER NOT NULL,
  last_err TEXT NOT NULL,
  created  INTEGER NOT NULL,
  dead     INTEGER NOT NULL
) STRICT;
CREATE INDEX deliveries_due ON deliveries (due) WHERE dead = 0;
CREATE INDEX deliveries_dead ON deliveries (id) WHERE dead = 1;
CREATE INDEX deliveries_hook ON deliveries (hook);

CREATE TABLE sessions (
  digest  TEXT PRIMARY KEY,
  person  TEXT NOT NULL,
  role    TEXT NOT NULL,
  data    BLOB,
  created INTEGER NOT NULL,
  expires INTEGER NOT NULL
) STRICT;
CREATE INDEX sessions_person ON sessions (person);

-- Work that one of the replicas does: who moves due has the turn.
CREATE TABLE turns (
  work TEXT PRIMARY KEY,
  due  INTEGER NOT NULL
) STRICT;

CREATE TABLE audit (
  id       INTEGER PRIMARY KEY,
  time     INTEGER NOT NULL,
  actor    TEXT NOT NULL,
  action   TEXT NOT NULL,
  subject  TEXT NOT NULL,
  detail   TEXT NOT NULL,
  previous TEXT NOT NULL,
  hash     TEXT NOT NULL
) STRICT;
-- One row: who appends holds it until the transaction ends.
CREATE TABLE audit_head (
  one  INTEGER PRIMARY KEY CHECK (one = 1),
  id   INTEGER NOT NULL,
  hash TEXT NOT NULL
) STRICT;
INSERT INTO audit_head (one, id, hash) VALUES (1, 0, '');

-- +goose StatementBegin
CREATE TRIGGER audit_no_update BEFORE UPDATE ON audit BEGIN SELECT RAISE(ABORT, 'the audit log is append-only'); END;
-- +goose StatementEnd
-- +goose StatementBegin
CREATE TRIGGER audit_no_delete BEFORE DELETE ON audit BEGIN SELECT RAISE(ABORT, 'the audit log is append-only'); END;
-- +goose StatementEnd
-- +goose StatementBegin
CREATE TRIGGER audit_head_forward BEFORE UPDATE ON audit_head WHEN NEW.id <= OLD.id BEGIN SELECT RAISE(ABORT, 'the audit log is append-only'); END;
-- +goose StatementEnd
-- +goose StatementBegin
CREATE TRIGGER audit_head_no_delete BEFORE DELETE ON audit_head BEGIN SELECT RAISE(ABORT, 'the audit log is append-only'); END;
-- +goose StatementEnd
