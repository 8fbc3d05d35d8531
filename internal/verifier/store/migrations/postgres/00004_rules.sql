-- +goose Up

-- learns: what the node shows for the first time is learned. certified: when its
-- newest certificate begins.
ALTER TABLE nodes ADD COLUMN learns SMALLINT NOT NULL DEFAULT 0;
ALTER TABLE nodes ADD COLUMN certified BIGINT NOT NULL DEFAULT 0;
ALTER TABLE nodes ADD COLUMN revoked_at BIGINT NOT NULL DEFAULT 0;
UPDATE nodes SET learns = 1 WHERE problem NOT LIKE 'node-restored%';

-- Names are in lower case. Of two that differ in case alone, one gets a new name, and
-- its operator is told.
UPDATE nodes SET version = version + 1, name = lower(substr(name, 1, 240)) || '-' || substr(id, 1, 8),
 problem = 'name-taken: another node has the name ' || lower(name) || ' but for capital letters: enrol one of them under another name'
 WHERE state <> 'revoked' AND name <> lower(name) AND EXISTS (SELECT 1 FROM nodes o
  WHERE o.id <> nodes.id AND o.state <> 'revoked' AND lower(o.name) = lower(nodes.name) AND (o.name = lower(o.name) OR o.id < nodes.id));
UPDATE nodes SET version = version + 1, name = lower(name) WHERE name <> lower(name);
UPDATE tokens SET name = lower(name) WHERE name <> lower(name);

-- Where a VM of which there are Reference Values was last, once its node had it no
-- more.
CREATE TABLE vm_left (
  uuid      TEXT PRIMARY KEY,
  node      TEXT NOT NULL REFERENCES nodes (id),
  ek_digest TEXT NOT NULL,
  gone      BIGINT NOT NULL
);

-- Certificates of nodes and of their certifiers, until they have expired; data is
-- that of a certifier.
CREATE TABLE certificates (
  serial  TEXT PRIMARY KEY,
  node    TEXT NOT NULL REFERENCES nodes (id),
  expires BIGINT NOT NULL,
  data    BYTEA
);
CREATE INDEX certificates_node ON certificates (node, expires);
CREATE INDEX certificates_expires ON certificates (expires);

-- One row: the newest revocation list, and a digest of what is in it.
CREATE TABLE crl (
  one    SMALLINT PRIMARY KEY CHECK (one = 1),
  number BIGINT NOT NULL,
  made   BIGINT NOT NULL,
  digest BYTEA,
  data   BYTEA
);
INSERT INTO crl (one, number, made) VALUES (1, 0, 0);
