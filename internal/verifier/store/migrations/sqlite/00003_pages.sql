-- +goose Up

-- VMs at a tier, and VMs with a text in their names, in the order in which they are
-- listed, without a look at all rows.
CREATE INDEX vms_tier ON vms (tier, uuid, node);
CREATE INDEX vms_name ON vms (uuid, node, name);

-- Nodes that want somebody's attention: few among many.
CREATE INDEX nodes_pending ON nodes (name, id) WHERE state = 'pending';
CREATE INDEX nodes_problem ON nodes (name, id) WHERE problem <> '';
